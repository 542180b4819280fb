//! Feature bits and their names.

/// Data compressed with zstd (incompatible, bit 0).
pub const INCOMPATIBLE_COMPRESSED: u64 = 1 << 0;
/// Guest data in another file (incompatible, bit 1).
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 1;
/// Guest data encrypted with LUKS (incompatible, bit 2).
pub const INCOMPATIBLE_ENCRYPTION: u64 = 1 << 2;
/// Holes show another image (incompatible, bit 3).
pub const INCOMPATIBLE_BACKING: u64 = 1 << 3;
/// Internal snapshots (read-only compatible, bit 0).
pub const READ_ONLY_SNAPSHOTS: u64 = 1 << 0;
/// Dirty bitmaps (autoclear, bit 0).
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// Incompatible features this code can read and write.
pub const INCOMPATIBLE_IMPLEMENTED: u64 = 0;
/// Read-only compatible features this code can write.
pub const READ_ONLY_IMPLEMENTED: u64 = 0;
/// Autoclear features this code keeps up to date.
pub const AUTOCLEAR_IMPLEMENTED: u64 = 0;

/// A set of feature bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeatureSet {
    /// Must be understood to read.
    Incompatible,
    /// Must be understood to write.
    ReadOnlyCompatible,
    /// May be ignored and kept.
    Compatible,
    /// Cleared by a writer that does not keep it up to date.
    Autoclear,
}

/// Names of the bits set in `bits`, lowest first: the feature's own name, or its set and number.
pub fn names(set: FeatureSet, bits: u64) -> Vec<String> {
    (0..u64::BITS).filter(|bit| bits & (1 << bit) != 0).map(|bit| name(set, bit)).collect()
}

fn name(set: FeatureSet, bit: u32) -> String {
    let known = match (set, bit) {
        (FeatureSet::Incompatible, 0) => Some("compressed extents (zstd)"),
        (FeatureSet::Incompatible, 1) => Some("external data file"),
        (FeatureSet::Incompatible, 2) => Some("encryption (LUKS)"),
        (FeatureSet::Incompatible, 3) => Some("backing file"),
        (FeatureSet::ReadOnlyCompatible, 0) => Some("internal snapshots"),
        (FeatureSet::Autoclear, 0) => Some("dirty bitmaps"),
        _ => None,
    };
    match known {
        Some(name) => name.to_owned(),
        None => {
            let set = match set {
                FeatureSet::Incompatible => "incompatible",
                FeatureSet::ReadOnlyCompatible => "read-only compatible",
                FeatureSet::Compatible => "compatible",
                FeatureSet::Autoclear => "autoclear",
            };
            format!("{set} feature bit {bit}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_has_a_name_of_its_own() {
        let sets = [
            FeatureSet::Incompatible,
            FeatureSet::ReadOnlyCompatible,
            FeatureSet::Compatible,
            FeatureSet::Autoclear,
        ];
        let mut all: Vec<String> = sets.iter().flat_map(|&set| names(set, u64::MAX)).collect();
        assert_eq!(all.len(), 256);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn names_are_those_of_the_bits() {
        assert_eq!(
            names(FeatureSet::Incompatible, INCOMPATIBLE_ENCRYPTION | 1 << 40),
            ["encryption (LUKS)", "incompatible feature bit 40"]
        );
    }
}
