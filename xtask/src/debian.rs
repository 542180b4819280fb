//! Installing packages on Debian.

use crate::shell;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Installs packages, from `release` if that is given, without what they merely recommend.
pub fn install(packages: &[&str], release: Option<&str>) -> Result<(), String> {
    let mut command = as_root("apt-get")?;
    command.args(["install", "--yes", "--no-install-recommends"]);
    if let Some(release) = release {
        command.args(["--target-release", release]);
    }
    command.args(packages);
    println!("  $ {}", shell::line(&command));
    shell::output(command.env("DEBIAN_FRONTEND", "noninteractive")).map(|_| ())
}

/// Reads the package lists again.
pub fn update() -> Result<(), String> {
    let mut command = as_root("apt-get")?;
    command.arg("update");
    println!("  $ {}", shell::line(&command));
    shell::output(&mut command).map(|_| ())
}

/// The version (major, minor) that a plain installation of a package would bring.
pub fn candidate(package: &str) -> Option<(u32, u32)> {
    let policy = shell::output(Command::new("apt-cache").args(["policy", package])).ok()?;
    let line = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?;
    let version = line.trim();
    version_of(version.split_once(':').map_or(version, |(_, rest)| rest))
}

/// Major and minor number at the start of a version.
pub fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The packages that a package depends on by name.
pub fn dependencies(package: &str) -> Result<Vec<String>, String> {
    let mut command = Command::new("apt-cache");
    let text = shell::output(command.args(["show", "--no-all-versions", package]))?;
    let list = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    let names = list.split(',').filter_map(|part| part.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// Downloads a package's file into `dir`; needs no rights.
pub fn download(package: &str, dir: &Path) -> Result<(), String> {
    println!("  $ apt-get download {package}");
    let mut command = Command::new("apt-get");
    shell::output(command.current_dir(dir).args(["download", package])).map(|_| ())
}

/// Makes the backports of this release known to apt, from the place its other packages come from.
/// Returns the name of the backports release.
pub fn add_backports() -> Result<String, String> {
    let about = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = about.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.ok_or("this system's release has no name")?.trim_matches('"');
    let backports = format!("{codename}-backports");
    let mut known = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    let parts = std::fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    known.extend(parts.map(|entry| entry.path()));
    known.sort();
    let sources = known.into_iter().filter_map(|path| {
        let deb822 = match path.extension()?.to_str()? {
            "list" => false,
            "sources" => true,
            _ => return None,
        };
        Some((deb822, std::fs::read_to_string(path).ok()?))
    });
    let sources: Vec<(bool, String)> = sources.collect();
    let entries: Vec<(bool, String)> = sources
        .iter()
        .flat_map(|(deb822, text)| entries(*deb822, text).into_iter().map(|e| (*deb822, e)))
        .collect();
    if entries.iter().any(|(deb822, entry)| rename(*deb822, entry, &backports, "").is_some()) {
        return Ok(backports);
    }
    let renamed = |(deb822, entry): &(bool, String)| {
        Some((*deb822, rename(*deb822, entry, codename, &backports)?))
    };
    let (deb822, entry) = entries
        .iter()
        .find_map(renamed)
        .ok_or_else(|| format!("apt has no source for {codename}, so none for its backports"))?;
    let suffix = if deb822 { "sources" } else { "list" };
    write_as_root(&format!("/etc/apt/sources.list.d/exd-backports.{suffix}"), &entry)?;
    update()?;
    Ok(backports)
}

/// The entries of a source file, without comments: stanzas of a .sources file, lines of a .list file.
fn entries(deb822: bool, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    if !deb822 {
        return lines.iter().map(|line| (*line).to_owned()).collect();
    }
    let stanzas = lines.split(|line| line.trim().is_empty());
    stanzas.filter(|stanza| !stanza.is_empty()).map(|stanza| stanza.join("\n")).collect()
}

/// The entry with the release `from` replaced by `to` and no other release, if it is an entry for binary
/// packages of that release that is in use.
fn rename(deb822: bool, entry: &str, from: &str, to: &str) -> Option<String> {
    if !deb822 {
        let mut words: Vec<&str> = entry.split_whitespace().collect();
        let at = words.iter().position(|word| *word == from)?;
        let place = words.first() == Some(&"deb") && words.get(at - 1)?.contains(":/");
        words[at] = to;
        return place.then(|| words.join(" ") + "\n");
    }
    let field = |name: &str| {
        let wanted = |line: &&str| {
            line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
        };
        entry.lines().find(wanted)
    };
    let has = |name, word| {
        let value = field(name).and_then(|line| line.split_once(':'));
        value.is_some_and(|(_, value)| value.split_whitespace().any(|each| each == word))
    };
    if !has("Types", "deb") || !has("Suites", from) || has("Enabled", "no") {
        return None;
    }
    let suites = field("Suites")?;
    let lines = entry.lines().map(|line| match line == suites {
        true => format!("Suites: {to}\n"),
        false => format!("{line}\n"),
    });
    Some(lines.collect())
}

fn write_as_root(path: &str, content: &str) -> Result<(), String> {
    println!("  writing {path}");
    let mut command = as_root("tee")?;
    command.arg(path).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(content.as_bytes()).map_err(|error| format!("{path}: {error}"))?;
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("cannot write {path}")) }
}

/// A program with root's rights: directly if we have them, through sudo otherwise.
fn as_root(program: &str) -> Result<Command, String> {
    let identity = shell::output(Command::new("id").arg("--user"))?;
    if identity.trim() == "0" {
        return Ok(Command::new(program));
    }
    if shell::find("sudo").is_none() {
        return Err("this needs root's rights, and there is no sudo".into());
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stanza_is_renamed_with_its_key_and_without_its_other_releases() {
        let text = "# comment\nTypes: deb\nURIs: http://example.invalid/debian\n\
                    Suites: sid sid-updates\nComponents: main\nSigned-By: /k.gpg\n\n\
                    Types: deb\nURIs: http://example.invalid/security\nSuites: sid-security\n";
        let entries = entries(true, text);
        assert_eq!(entries.len(), 2);
        let renamed = rename(true, &entries[0], "sid", "sid-backports");
        let expected = "Types: deb\nURIs: http://example.invalid/debian\nSuites: sid-backports\n\
                        Components: main\nSigned-By: /k.gpg\n";
        assert_eq!(renamed.as_deref(), Some(expected));
        assert_eq!(rename(true, &entries[1], "sid", "sid-backports"), None);
    }

    #[test]
    fn a_line_is_renamed() {
        let line = "deb [signed-by=/k.gpg] http://example.invalid/debian sid main";
        let expected = "deb [signed-by=/k.gpg] http://example.invalid/debian sid-backports main\n";
        assert_eq!(rename(false, line, "sid", "sid-backports").as_deref(), Some(expected));
        assert_eq!(rename(false, "deb-src http://example.invalid/ sid main", "sid", "x"), None);
        assert_eq!(rename(false, "# nothing", "sid", "x"), None);
    }

    #[test]
    fn versions() {
        assert_eq!(version_of("7.2+dfsg-7"), Some((7, 2)));
        assert_eq!(version_of("10.0.2+ds-2+deb13u1"), Some((10, 0)));
        assert_eq!(version_of("none"), None);
    }
}
