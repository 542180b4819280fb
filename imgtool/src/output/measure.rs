//! The output of `measure`.

use serde::Serialize;

/// Upper bounds of a new image's file, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// For what the source holds.
    pub required: u64,
    /// When every block is written.
    pub fully_allocated: u64,
}

/// The text form.
pub fn text(measure: &Measure) -> String {
    format!(
        "required size: {}\nfully allocated size: {}\n",
        measure.required, measure.fully_allocated
    )
}
