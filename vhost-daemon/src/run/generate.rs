//! Man pages and shell completions, made from the same declarations as the help.

use clap::Command;
use clap_complete::Shell;
use std::fs;
use std::io;
use std::path::Path;

/// Writes those of `command` to the directories `man` and `completions` in `directory`.
pub fn generate(command: &Command, directory: &Path) -> io::Result<()> {
    let man = directory.join("man");
    let completions = directory.join("completions");
    for path in [&man, &completions] {
        fs::create_dir_all(path)?;
    }
    clap_mangen::generate_to(command.clone(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let name = command.get_name().to_owned();
        clap_complete::generate_to(shell, &mut command.clone(), name, &completions)?;
    }
    Ok(())
}
