//! `imgtool generate`: man pages and shell completions, made from the same declarations as the help.

use super::Cli;
use crate::failure::{Context, During, Failure, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::fs;
use std::path::{Path, PathBuf};

/// The arguments of `generate`.
#[derive(Args, Debug)]
#[command(about = "Write man pages and shell completions")]
pub struct GenerateArgs {
    /// The directory to write to
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
}

/// Runs `generate`.
pub fn run(args: GenerateArgs) -> Result<u8> {
    generate(&args.directory).about(&args.directory)?;
    Ok(0)
}

fn generate(directory: &Path) -> Result<()> {
    let man = directory.join("man");
    let completions = directory.join("completions");
    for path in [&man, &completions] {
        fs::create_dir_all(path).during("could not create")?;
    }
    clap_mangen::generate_to(Cli::command(), &man).during("could not write man pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "imgtool", &completions)
            .map_err(|error| Failure::new(format_args!("could not write completions: {error}")))?;
    }
    Ok(())
}
