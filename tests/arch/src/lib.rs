//! What the architecture checks look at: the packages as cargo sees them, and the files under version
//! control.

#![forbid(unsafe_code)]

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package of the workspace.
#[derive(Debug)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its directory, from the root of the workspace.
    pub dir: PathBuf,
    /// What it depends on.
    pub dependencies: Vec<Dependency>,
    /// The root files of its library and programs, from the root of the workspace.
    pub roots: Vec<PathBuf>,
}

impl Package {
    /// Whether it is one of the test packages, or the task runner: what nothing may depend on.
    pub fn is_tooling(&self) -> bool {
        self.dir.starts_with("tests") || self.dir.starts_with("xtask")
    }

    /// Names of what it depends on, development dependencies too or not.
    pub fn dependency_names(&self, development: bool) -> BTreeSet<&str> {
        let wanted = |dependency: &&Dependency| development || !dependency.development;
        self.dependencies.iter().filter(wanted).map(|d| d.name.as_str()).collect()
    }
}

/// A direct dependency.
#[derive(Debug)]
pub struct Dependency {
    /// Name of the package.
    pub name: String,
    /// Whether only tests and examples have it.
    pub development: bool,
}

/// The packages of the workspace, as `cargo metadata` lists them.
///
/// # Panics
/// If cargo fails: these checks need a workspace that cargo can read.
pub fn packages() -> Vec<Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    let output = Command::new(cargo).current_dir(root()).args(arguments).output();
    let output = output.expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    list(&metadata["packages"]).iter().map(package).collect()
}

fn package(value: &Value) -> Package {
    let inside = |path: &Value| {
        let path = Path::new(path.as_str().expect("a path"));
        path.strip_prefix(root()).expect("inside the workspace").to_path_buf()
    };
    let is_program = |target: &&Value| {
        let kinds = list(&target["kind"]);
        kinds.iter().any(|kind| ["lib", "bin"].contains(&kind.as_str().unwrap_or_default()))
    };
    let manifest = inside(&value["manifest_path"]);
    Package {
        name: text(&value["name"]),
        dir: manifest.parent().expect("a directory").to_path_buf(),
        dependencies: list(&value["dependencies"]).iter().map(dependency).collect(),
        roots: list(&value["targets"])
            .iter()
            .filter(is_program)
            .map(|target| inside(&target["src_path"]))
            .collect(),
    }
}

fn dependency(value: &Value) -> Dependency {
    Dependency { name: text(&value["name"]), development: value["kind"] == "dev" }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// The root of the workspace.
pub fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("two directories up")
}

/// Every file under version control that is text: (path from the root, content). Fixtures are images.
///
/// # Panics
/// If git fails or a text file is not UTF-8.
pub fn text_files() -> Vec<(PathBuf, String)> {
    let output = Command::new("git").current_dir(root()).args(["ls-files", "-z"]).output();
    let output = output.expect("git starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).expect("file names in UTF-8");
    let paths = names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from);
    let is_text = |path: &PathBuf| !path.starts_with("fixtures") && root().join(path).is_file();
    paths
        .filter(is_text)
        .map(|path| {
            let content = std::fs::read(root().join(&path)).expect("a readable file");
            let content = String::from_utf8(content);
            (path.clone(), content.unwrap_or_else(|_| panic!("{} is not text", path.display())))
        })
        .collect()
}

/// Lines that `is_wrong` finds in the text files that `is_meant` chooses, as `path:line: text`.
pub fn wrong_lines(
    is_meant: impl Fn(&Path) -> bool,
    is_wrong: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, content) in text_files().iter().filter(|(path, _)| is_meant(path)) {
        for (number, line) in content.lines().enumerate().filter(|(_, line)| is_wrong(line)) {
            wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
        }
    }
    wrong
}
