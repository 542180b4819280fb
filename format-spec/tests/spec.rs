//! `SPEC.md` and the code say the same: offsets, decision tables, the worked example, limits.

use exd_format::layout::*;
use exd_format::*;
use std::cmp::Ordering;
use std::collections::BTreeMap;

#[path = "../examples/specimen.rs"]
mod specimen;

const SPEC: &str = include_str!("../SPEC.md");

/// The rows of each table that stands behind a `<!-- what: name -->` line, by name.
fn tables(what: &str) -> BTreeMap<String, Vec<Vec<String>>> {
    let mut found = BTreeMap::new();
    let mut lines = SPEC.lines();
    while let Some(line) = lines.next() {
        let mark = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->"));
        let Some(name) = mark.and_then(|mark| mark.strip_prefix(what)?.strip_prefix(": ")) else {
            continue;
        };
        let rows = lines
            .by_ref()
            .take_while(|line| line.starts_with('|'))
            .skip(2)
            .map(|line| {
                line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
            })
            .collect();
        assert!(found.insert(name.to_owned(), rows).is_none(), "two tables {name}");
    }
    found
}

#[test]
fn tables_of_offsets_are_those_of_the_code() {
    let code: BTreeMap<&str, &[FieldInfo]> = BTreeMap::from([
        ("header", header_layout::FIELDS),
        ("superblock", superblock_layout::FIELDS),
        ("area_pointer", area_pointer_layout::FIELDS),
        ("segment", segment_layout::FIELDS),
        ("node_pointer", node_pointer_layout::FIELDS),
        ("node", node_layout::FIELDS),
        ("internal_entry", internal_entry_layout::FIELDS),
        ("extent", extent_layout::FIELDS),
        ("space_list", space_list_layout::FIELDS),
        ("space_range", space_range_layout::FIELDS),
        ("record", record_layout::FIELDS),
        ("entry", entry_layout::FIELDS),
        ("completion_log", completion_log_layout::FIELDS),
        ("completion_slot", completion_slot_layout::FIELDS),
        ("holder", holder_layout::FIELDS),
    ]);
    let spec = tables("layout");
    assert!(spec.keys().eq(code.keys()), "the same structures: {:?}", spec.keys());
    for (name, rows) in &spec {
        let mut fields = code[name.as_str()].to_vec();
        if rows[0][2] == "header" {
            // The first five fields are the common header.
            let end = fields[4].offset + fields[4].size;
            assert_eq!((end, fields[0].name, fields[1].name), (HEADER_SIZE, "kind", "crc"));
            fields.splice(..5, [FieldInfo { name: "header", offset: 0, size: HEADER_SIZE }]);
        }
        let stated: Vec<(usize, usize, &str)> = rows
            .iter()
            .map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap(), row[2].as_str()))
            .collect();
        let declared: Vec<(usize, usize, &str)> =
            fields.iter().map(|field| (field.offset, field.size, field.name)).collect();
        assert_eq!(stated, declared, "{name}");
    }
}

/// The one row that matches; a cell matches if it is `any` or one of `values`.
fn sole_row<'a>(rows: &'a [Vec<String>], facts: &[&str]) -> &'a str {
    let matching: Vec<_> = rows
        .iter()
        .filter(|row| row.iter().zip(facts).all(|(cell, fact)| cell == "any" || cell == fact))
        .collect();
    assert_eq!(matching.len(), 1, "rows for {facts:?}: {matching:?}");
    matching[0].last().unwrap()
}

const ORDERS: [Ordering; 3] = [Ordering::Less, Ordering::Equal, Ordering::Greater];

fn compared(order: Ordering, equal: &'static str) -> &'static str {
    match order {
        Ordering::Less => "earlier",
        Ordering::Equal => equal,
        Ordering::Greater => "later",
    }
}

fn yes(fact: bool) -> &'static str {
    if fact { "yes" } else { "no" }
}

/// P4, P6.
#[test]
fn p6_replay_table_over_every_combination() {
    let tables = tables("table");
    let mut seen = Vec::new();
    for bits in 0..8 {
        for epoch in ORDERS {
            for sequence in ORDERS {
                let facts = SlotFacts {
                    record: bits & 1 != 0,
                    chain: bits & 2 != 0,
                    sound: bits & 4 != 0,
                    epoch,
                    sequence,
                };
                let cells = [
                    yes(facts.record),
                    compared(epoch, "ours"),
                    compared(sequence, "due"),
                    yes(facts.chain),
                    yes(facts.sound),
                ];
                let decided = match decide(&facts) {
                    SlotCase::Apply => "apply",
                    SlotCase::EndNoRecord => "end: no record",
                    SlotCase::EndEarlierEpoch => "end: earlier epoch",
                    SlotCase::EndEarlierLap => "end: earlier lap",
                    SlotCase::CorruptLaterEpoch => "corrupt: later epoch",
                    SlotCase::CorruptLaterRecord => "corrupt: later record",
                    SlotCase::CorruptChain => "corrupt: chain",
                    SlotCase::CorruptContent => "corrupt: content",
                };
                assert_eq!(sole_row(&tables["replay"], &cells), decided, "{facts:?}");
                seen.push(decided);
            }
        }
    }
    assert_eq!(seen.len(), 72);
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), tables["replay"].len(), "every row is reached");
}

/// P6.
#[test]
fn p6_end_of_log_table_over_every_combination() {
    let tables = tables("table");
    for epoch in [2, 3, 4] {
        for durable in [18, 19, 20, 21] {
            let found = RecordSummary { epoch, sequence: 30, durable, length: 4096 };
            let cells = [
                compared(epoch.cmp(&3), "ours"),
                if durable < 20 { "below s" } else { "s or above" },
            ];
            let nothing = sole_row(&tables["end"], &cells) == "nothing";
            assert_eq!(contradicts_end(&found, 3, 20).is_none(), nothing, "{found:?}");
        }
    }
}

/// P2, P6.
#[test]
fn p6_completion_log_table_over_every_combination() {
    let tables = tables("table");
    let superblock = example_superblock();
    let geometry = superblock.geometry();
    for bits in 0..8_u8 {
        for order in ORDERS {
            let (whole, ours, valid) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
            let entry = Entry::map(0, 128, u32::from(valid), 1);
            let cseq = [9, 10, 11][(order as i8 + 1) as usize];
            let slot = CompletionSlot { entry, cseq };
            let mut bytes = slot.encode(&geometry.uuid, if ours { 1 } else { 2 });
            bytes[30] ^= u8::from(!whole);
            let found = CompletionSlot::classify(&bytes, &geometry, 1, 10);
            let cells = [yes(whole), yes(ours), compared(order, "due"), yes(valid)];
            let right = match sole_row(&tables["log"], &cells) {
                "apply" => found == LogSlot::Apply(entry),
                "end" => found == LogSlot::End,
                "corrupt" => matches!(found, LogSlot::Corrupt(_)),
                other => panic!("unknown outcome {other}"),
            };
            assert!(right, "{cells:?}: {found:?}");
        }
    }
}

/// P4, P6.
#[test]
fn p6_choice_table_over_every_combination() {
    let tables = tables("table");
    let kinds = ["valid", "unsupported", "damaged", "none"];
    let contents = ["higher", "lower", "equal, same content", "equal, different content"];
    for one in kinds {
        for other in kinds {
            for relation in contents {
                let (a_slot, b_slot) = (slot(one, 7, relation), slot(other, 7, "other"));
                let outcome = choose(a_slot.clone(), b_slot.clone());
                // The table names a pair once; the code must not care for the order.
                let (a, b, one_is_higher) = if kinds.iter().position(|k| *k == one)
                    <= kinds.iter().position(|k| *k == other)
                {
                    (one, other, relation == "higher")
                } else {
                    (other, one, relation == "lower")
                };
                let both_valid = a == "valid" && b == "valid";
                let cell = match relation {
                    "higher" | "lower" if both_valid || one_is_higher => "one is higher",
                    "higher" | "lower" => "other is higher",
                    same if both_valid => same,
                    _ => "equal",
                };
                let expected = sole_row(&tables["choice"], &[a, b, cell]);
                let right = match (&outcome, expected) {
                    (Choice::Use { slot, superblock, both }, "use the one") => {
                        let first = one == "valid" && (other != "valid" || relation != "lower");
                        *slot == usize::from(!first)
                            && *both == (both_valid && relation == "equal, same content")
                            && Ok(&**superblock) == [&a_slot, &b_slot][*slot].as_ref()
                    }
                    (Choice::Unsupported { .. }, "refuse")
                    | (Choice::Corrupt(_), "corrupt")
                    | (Choice::NotExd, "not an EXD image") => true,
                    _ => false,
                };
                assert!(right, "{one}, {other}, {relation}: {expected}, but {outcome:?}");
            }
        }
    }
}

/// What decoding a slot of this kind gives; `relation` says how it differs from generation 7.
fn slot(kind: &str, generation: u64, relation: &str) -> Result<Superblock, DecodeError> {
    let generation = match relation {
        "higher" => generation + 1,
        "lower" => generation - 1,
        _ => generation,
    };
    let applied = u64::from(relation == "equal, different content");
    match kind {
        "valid" => Ok(Superblock { generation, applied, ..example_superblock() }),
        "unsupported" => {
            Err(DecodeError::Unsupported { features: vec!["x".to_owned()], generation })
        }
        "damaged" => Err(DecodeError::corrupt("superblock", 4, "damaged")),
        _ => Err(DecodeError::Foreign),
    }
}

fn example_superblock() -> Superblock {
    let (_, _, bytes) = &specimen::structures()[0];
    Superblock::decode(bytes, 1, None).expect("valid")
}

/// The image of the worked example, from the bytes printed in `SPEC.md`.
fn image() -> Vec<u8> {
    let mut image = vec![0; 180_224];
    for line in example().lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let offset = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
        for (index, word) in words.enumerate() {
            image[offset + index] = u8::from_str_radix(word, 16).unwrap();
        }
    }
    image
}

fn example() -> &'static str {
    let (_, rest) = SPEC.split_once("<!-- example -->\n```\n").expect("there is an example");
    rest.split_once("```").expect("it ends").0
}

#[test]
fn the_example_is_what_the_code_prints() {
    assert_eq!(example(), specimen::dump());
}

#[test]
fn the_example_reads_as_the_text_says() {
    let image = image();
    let at = |offset: u64, length: u64| &image[offset as usize..(offset + length) as usize];
    let slots =
        [0, 1].map(|slot| Superblock::decode(at(Superblock::slot_address(slot), 4096), slot, None));
    assert_eq!(slots[0], Err(DecodeError::Foreign));
    let [slot0, slot1] = slots;
    let Choice::Use { slot: 1, superblock, both: false } = choose(slot0, slot1) else {
        panic!("slot 1 is the one")
    };
    let geometry = superblock.geometry();
    let node = Node::decode(
        at(superblock.root.address, 4096),
        &ExpectedNode::root(superblock.root),
        &geometry,
    )
    .expect("the root");
    let NodeEntries::Leaf(extents) = node.entries else { panic!("a leaf") };
    let places: Vec<_> =
        extents.iter().map(|e| (e.logical, e.length, e.state, e.physical)).collect();
    assert_eq!(places, [(0, 1, ExtentState::Written, 288), (16, 4, ExtentState::Unwritten, 296)]);
    let list = superblock.space_list;
    let list = SpaceList::decode(at(list.address, list.length), &list, &geometry).expect("a list");
    assert_eq!(list.ranges, [SpaceRange { start: 328, kind: SpaceKind::Open, sectors: 24 }]);
    let mut expected = Expected {
        geometry,
        epoch: superblock.epoch,
        sequence: superblock.tail_sequence,
        chain: superblock.tail_chain,
        applied: superblock.applied,
        through: 0,
        record_bits: superblock.record_bits,
        room: 65536,
    };
    let Slot::Apply { record, crc } = classify(at(65536, 65536), 65536, &expected) else {
        panic!("a record")
    };
    assert_eq!(record.entries, [Entry::map(5, 328, 1, 1), Entry::convert(16, 296, 1, 1)]);
    expected =
        Expected { sequence: 2, chain: crc, through: record.through, room: 61440, ..expected };
    assert_eq!(classify(at(69632, 61440), 69632, &expected), Slot::End("no record"));
}

#[test]
fn limits_are_those_of_the_code() {
    let row = |name: &str| {
        let line = SPEC.lines().find(|line| line.starts_with(&format!("| {name} |")));
        line.unwrap_or_else(|| panic!("no limit {name}")).to_owned()
    };
    let least_most = |name: &str, least: u64, most: u64| {
        let cell = |value: u64| match value {
            value if value > 65536 && value.is_power_of_two() => format!("2^{}", value.ilog2()),
            value => value.to_string(),
        };
        let expected = format!("| {name} | {} | {} |", cell(least), cell(most));
        assert!(row(name).starts_with(&expected), "{} is not {expected}", row(name));
    };
    least_most("block size", 1 << BLOCK_BITS_MIN, 1 << BLOCK_BITS_MAX);
    least_most("virtual size", 0, VIRTUAL_SIZE_MAX);
    least_most("place in the file", FIXED_AREA, PHYSICAL_END);
    least_most("node size", 1 << NODE_BITS_MIN, 1 << NODE_BITS_MAX);
    least_most("level", 0, u64::from(LEVEL_MAX));
    least_most("generation, epoch, cseq, sequence in a superblock", 0, COUNTER_MAX);
    least_most("journal segments", 1, SEGMENTS_MAX as u64);
    least_most("ring", SEGMENT_ALIGN, RING_MAX);
    least_most("record", 1 << RECORD_BITS_MIN, RECORD_MAX as u64);
    least_most("entries in a record", 0, entries_per_record(RECORD_MAX) as u64);
    least_most("space list", METADATA_ALIGN, SPACE_LIST_MAX);
    least_most("completion log slots", 1, u64::from(SLOT_COUNT_MAX));
}

#[test]
fn features_and_kinds_are_those_of_the_code() {
    use exd_format::features::{FeatureSet, names};
    for (set, name) in [
        (FeatureSet::Incompatible, "incompatible"),
        (FeatureSet::ReadOnlyCompatible, "read_only_compatible"),
        (FeatureSet::Autoclear, "autoclear"),
    ] {
        for bit in 0..64 {
            let feature = &names(set, 1 << bit)[0];
            let known = !feature.contains("feature bit");
            let row = format!("| {name} | {bit} | {feature} |");
            let named = SPEC.lines().any(|line| line.starts_with(&format!("| {name} | {bit} |")));
            assert_eq!(known, named, "{row}");
            assert!(!known || SPEC.contains(&row), "{row}");
        }
    }
    for kind in [
        StructureType::Superblock,
        StructureType::Holder,
        StructureType::Node,
        StructureType::JournalRecord,
        StructureType::SpaceList,
        StructureType::CompletionLog,
        StructureType::SnapshotTable,
        StructureType::BitmapDirectory,
        StructureType::EncryptionArea,
        StructureType::CompressedChunk,
    ] {
        let tag = String::from_utf8(kind.tag().to_vec()).unwrap();
        assert!(SPEC.lines().any(|line| line.starts_with(&format!("| `{tag}` | "))), "{tag}");
    }
    for kind in EntryKind::ALL {
        let row = format!("| {} | {} |", *kind as u8, format!("{kind:?}").to_uppercase());
        assert!(SPEC.contains(&row), "{row}");
    }
}
