//! qcow2 images, through the imago crate.

use super::qcow2_header::{HEADER_BYTES, Qcow2Header};
use super::{Format, Image, Piece, State};
use crate::failure::{During, Failure, Result, reason};
use crate::options::{FormatOptions, Preallocation, QCOW2_CLUSTER_SIZE};
use crate::output::info::{FormatSpecific, ImageInfo};
use exd_file::HostFile;
use imago::format::PreallocateMode;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, Storage, StorageOpenOptions,
};
use std::io::{self, ErrorKind};
use std::path::Path;

/// Deepest backing chain that is followed.
const CHAIN_MAX: u32 = 64;

/// A qcow2 image.
pub struct Qcow2Image {
    access: FormatAccess<imago::file::File>,
    file: HostFile,
}

/// Reads the header of an image file.
pub fn read_header(file: &HostFile) -> Result<Qcow2Header> {
    let mut bytes = vec![0; HEADER_BYTES];
    file.read_at(0, &mut bytes).during("could not read at offset 0")?;
    Qcow2Header::parse(&bytes)
}

/// Opens an image.
pub fn open(file: HostFile, write: bool) -> Result<Box<dyn Image>> {
    let header = read_header(&file)?;
    header.refuse_unreadable()?;
    let qcow2 = Qcow2::<imago::file::File>::builder(storage(&file, write)?)
        .write(write)
        .open(CheckedGate { depth: 0 })
        .during("could not open as qcow2")?;
    Ok(Box::new(Qcow2Image { access: FormatAccess::new(qcow2), file }))
}

/// Makes an image.
pub fn create(file: HostFile, size: u64, options: &FormatOptions) -> Result<Box<dyn Image>> {
    if file.is_block_device() {
        return Err(Failure::new(
            "imgtool does not write qcow2 images to block devices; use a file, or '-O raw'",
        ));
    }
    let cluster_size = options.block_size.unwrap_or(QCOW2_CLUSTER_SIZE);
    let mut builder = Qcow2::<imago::file::File>::create_builder(storage(&file, true)?)
        .size(size)
        .cluster_size(cluster_size as usize)
        .preallocate(match options.preallocation {
            Preallocation::Off => PreallocateMode::None,
            Preallocation::Metadata => PreallocateMode::FormatAllocate,
            Preallocation::Falloc => PreallocateMode::FullAllocate,
            Preallocation::Full => PreallocateMode::WriteData,
        });
    if let Some(bits) = options.refcount_bits {
        builder = builder.refcount_width(bits as usize);
    }
    builder.create().during("could not create the qcow2 structures")?;
    open(file, true)
}

/// A second descriptor of the same open file, so that the lock is held by what writes.
fn storage(file: &HostFile, write: bool) -> Result<imago::file::File> {
    let duplicate = file.duplicate().during("could not duplicate the descriptor")?;
    let options = StorageOpenOptions::new().write(write).filename(file.path());
    imago::file::File::from_open_file(duplicate, options).during("could not use the file")
}

/// Opens backing images and data files that an image names, after the check of our own.
struct CheckedGate {
    depth: u32,
}

impl<S: Storage + 'static> ImplicitOpenGate<S> for CheckedGate {
    fn open_format<F: FormatDriverBuilder<S>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<S>> {
        if self.depth >= CHAIN_MAX {
            return Err(io::Error::other(format!(
                "the backing chain is longer than {CHAIN_MAX} images or refers to itself"
            )));
        }
        if let Some(path) = builder.get_image_path() {
            check_backing(&path, F::FORMAT)?;
        }
        let image = builder.open(CheckedGate { depth: self.depth + 1 })?;
        Ok(FormatAccess::new(image))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<S> {
        S::open(options)
    }
}

/// Refuses a backing image that would be misread.
fn check_backing(path: &Path, format: imago::format::Format) -> io::Result<()> {
    let named = |text: String| {
        io::Error::new(ErrorKind::Unsupported, format!("backing file '{}': {text}", path.display()))
    };
    if !matches!(format, imago::format::Format::Qcow2) {
        return Ok(());
    }
    let file = HostFile::open(path, exd_file::OpenMode::default())
        .map_err(|error| named(error.to_string()))?;
    let header = read_header(&file).map_err(|failure| named(failure.text))?;
    header.refuse_unreadable().map_err(|failure| named(failure.text))
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn piece(&mut self, offset: u64, len: u64) -> Result<Piece> {
        let (mapping, found) = self
            .access
            .get_mapping(offset, len)
            .during(format_args!("could not read the mapping of offset {offset}"))?;
        let (state, physical) = match mapping {
            Mapping::Raw { offset, .. } => (State::Data, Some(offset)),
            Mapping::Zero { explicit: true, .. } => (State::Zero, None),
            Mapping::Zero { .. } | Mapping::Eof { .. } => (State::Hole, None),
            Mapping::Special { .. } => (State::Compressed, None),
            _ => (State::Compressed, None),
        };
        let len = if found == 0 { len } else { found.min(len) };
        Ok(Piece { len, state, physical, depth: 0 })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.access.read(buffer, offset).during(format_args!("could not read at offset {offset}"))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.access.write(data, offset).during(format_args!("could not write at offset {offset}"))
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.access
            .discard_to_zero(offset, len)
            .during(format_args!("could not zero at offset {offset}"))
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.access.resize(size, PreallocateMode::None).map_err(|error| {
            Failure::new(format_args!("could not resize to {size}: {}", reason(&error)))
        })
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.access.flush().during("could not flush")?;
        self.access.sync().during("could not sync")?;
        drop(self.access);
        self.file.sync().during("could not sync")
    }
}

/// What the header tells `info`; also of images that cannot be opened.
pub fn describe(header: &Qcow2Header, file: &HostFile, info: &mut ImageInfo) {
    info.virtual_size = header.size;
    info.cluster_size = Some(header.cluster_size);
    info.format = Format::Qcow2.name().to_owned();
    info.dirty_flag = header.is_dirty();
    info.backing_filename = header.backing_file.clone();
    info.full_backing_filename = header.backing_file.as_ref().map(|name| {
        let directory = file.path().parent().unwrap_or(Path::new(""));
        directory.join(name).to_string_lossy().into_owned()
    });
    info.backing_filename_format = header.backing_format.clone();
    info.format_specific = Some(FormatSpecific::Qcow2(Box::new(header.data())));
}
