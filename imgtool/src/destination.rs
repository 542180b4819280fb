//! Where a new image goes, so that an interrupted command leaves nothing that passes for an image.
//!
//! A file is made without a name (O_TMPFILE) in the directory of its destination, or where the file
//! system cannot do that, under a temporary name; it takes its destination's name when it is
//! complete and durable. A block device has its start withheld (see `device` and `formats::raw`).

use crate::failure::{During, Failure, Result};
use crate::formats::open::{lock_image, probe};
use crate::formats::{Format, Image, create, stream};
use crate::options::{EXD_BLOCK_SIZE, FormatOptions};
use exd_file::{HostFile, LockMode, OpenMode};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// A new image on its way to its place.
pub struct Destination {
    kind: Kind,
}

enum Kind {
    /// Nothing to do at the end.
    InPlace,
    /// A file that has no name or a temporary one.
    File(Box<NewFile>),
}

struct NewFile {
    file: File,
    /// Where it belongs.
    place: PathBuf,
    /// Its temporary name, if it has one. Removed when dropped.
    temporary: Option<PathBuf>,
    /// What lies there now, locked so that no image in use is replaced.
    _replaced: Option<HostFile>,
}

/// Is told the options in effect, before anything is written.
pub type Announce<'a> = &'a dyn Fn(&FormatOptions) -> Result<()>;

/// Starts a new image at `path`. It counts only after [`Image::finish`] and
/// [`Destination::commit`].
pub fn start(
    path: &Path,
    format: Format,
    size: u64,
    options: FormatOptions,
    announce: Announce<'_>,
) -> Result<(Destination, Box<dyn Image>)> {
    start_here(path, format, size, options, announce).map_err(|failure| failure.about(path))
}

fn start_here(
    path: &Path,
    format: Format,
    size: u64,
    options: FormatOptions,
    announce: Announce<'_>,
) -> Result<(Destination, Box<dyn Image>)> {
    let in_place = Destination { kind: Kind::InPlace };
    if stream::is_stream(path) {
        if format != Format::Raw {
            return Err(Failure::new(format_args!(
                "format {} needs a file or block device, not a stream",
                format.name()
            )));
        }
        announce(&options)?;
        return Ok((in_place, stream::target(path, size)?));
    }
    let existing = fs::metadata(path);
    let (destination, file) =
        if existing.as_ref().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            (in_place, open_device(path, format)?)
        } else {
            let new = NewFile::start(path, format)?;
            let duplicate = new.file.try_clone().during("could not duplicate the descriptor")?;
            let file = HostFile::from_file(duplicate, path, false).map_err(Failure::new)?;
            lock_image(&file, LockMode::Writer, format)?;
            (Destination { kind: Kind::File(Box::new(new)) }, file)
        };
    let options = complete(options, format, &file)?;
    announce(&options)?;
    Ok((destination, create(format, file, size, &options)?))
}

/// Length of a file that a unit of direct I/O can be found out on, by reading.
const PROBE_BYTES: u64 = 128 << 10;

/// Chooses the block size of an EXD image, if the user has not: such that direct I/O on the file can
/// write any block by itself.
fn complete(mut options: FormatOptions, format: Format, file: &HostFile) -> Result<FormatOptions> {
    if format == Format::Exd && options.block_size.is_none() {
        let changed = "could not change the length";
        let file_of_ours = !file.is_block_device();
        if file_of_ours {
            file.set_len(PROBE_BYTES).during(changed)?;
        }
        let unit = u32::try_from(file.direct_unit()).unwrap_or(EXD_BLOCK_SIZE);
        if file_of_ours {
            file.set_len(0).during(changed)?;
        }
        options.block_size = Some(unit.max(EXD_BLOCK_SIZE));
    }
    Ok(options)
}

/// Opens a block device to be overwritten, unless it is mounted or held otherwise.
pub fn open_device(path: &Path, format: Format) -> Result<HostFile> {
    // The kernel refuses an exclusive open of a device that is mounted or part of another one.
    let probe =
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(path);
    if let Err(error) = probe {
        return Err(match error.raw_os_error() {
            Some(libc::EBUSY) => Failure::new("the device is mounted or otherwise in use"),
            _ => Failure::new(format_args!("could not open: {}", crate::failure::reason(&error))),
        });
    }
    let mode = OpenMode { write: true, direct: false };
    let file = HostFile::open(path, mode).map_err(Failure::new)?;
    lock_image(&file, LockMode::Writer, format)?;
    Ok(file)
}

impl NewFile {
    fn start(path: &Path, format: Format) -> Result<Self> {
        // Through symbolic links: what they point to is replaced, as if it were overwritten.
        let place = match fs::canonicalize(path) {
            Ok(place) => place,
            Err(error) if error.kind() == ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(error).during("could not open"),
        };
        let replaced = lock_replaced(&place, format)?;
        let directory = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let (file, temporary) = create_unnamed(directory, &place).during("could not create")?;
        let new = NewFile { file, place, temporary, _replaced: replaced };
        new.copy_permissions();
        Ok(new)
    }

    /// A file that replaces another belongs to the same people, as far as we may do that.
    fn copy_permissions(&self) {
        let Ok(metadata) = fs::metadata(&self.place) else { return };
        let _ = fchown(&self.file, Some(metadata.uid()), Some(metadata.gid()));
        let _ = self.file.set_permissions(Permissions::from_mode(metadata.mode() & 0o777));
    }

    /// Gives the file its place. Its content is durable already.
    fn commit(mut self) -> io::Result<()> {
        if self.temporary.is_none() {
            let name = temporary_name(&self.place);
            // The name is ours by its process number; a dead process may have left it.
            if let Err(error) = fs::remove_file(&name)
                && error.kind() != ErrorKind::NotFound
            {
                return Err(error);
            }
            let descriptor = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            linkat(AT_FDCWD, descriptor.as_str(), AT_FDCWD, &name, follow)?;
            self.temporary = Some(name);
        }
        // The permissions and the length of a file that was only fdatasync'ed.
        self.file.sync_all()?;
        if let Some(name) = &self.temporary {
            fs::rename(name, &self.place)?;
        }
        self.temporary = None;
        let directory = match self.place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // Nothing more can be done about a file that cannot be removed.
            let _ = fs::remove_file(name);
        }
    }
}

/// Locks the image that is about to be replaced; `None` if there is no file.
fn lock_replaced(place: &Path, format: Format) -> Result<Option<HostFile>> {
    let file = match HostFile::open(place, OpenMode { write: true, direct: false }) {
        Ok(file) => file,
        Err(error) if error.source.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::new(error)),
    };
    let present = probe(&file).unwrap_or(format);
    lock_image(&file, LockMode::Writer, present)?;
    Ok(Some(file))
}

/// A new file without a name, or with a temporary one where the file system needs a name.
fn create_unnamed(directory: &Path, place: &Path) -> io::Result<(File, Option<PathBuf>)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(directory) {
        Ok(file) => return Ok((file, None)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
            ) => {}
        Err(error) => return Err(error),
    }
    let name = temporary_name(place);
    let file = options.create_new(true).open(&name)?;
    Ok((file, Some(name)))
}

/// `.NAME.imgtool-PID.part` beside the destination.
fn temporary_name(place: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(place.file_name().unwrap_or_default());
    name.push(format!(".imgtool-{}.part", std::process::id()));
    place.with_file_name(name)
}

impl Destination {
    /// A destination that existed and is written in place.
    pub fn in_place() -> Self {
        Destination { kind: Kind::InPlace }
    }

    /// Puts the finished image into its place.
    pub fn commit(self) -> Result<()> {
        match self.kind {
            Kind::InPlace => Ok(()),
            Kind::File(new) => new.commit().during("could not put the new image into place"),
        }
    }
}
