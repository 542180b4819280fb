//! The completion log's writing side: memory that outlives the process (P2).

use crate::storage::Storage;
use exd_format::{CompletionLogHeader, CompletionSlot, Entry, FLAG_SYNC_FAILED};

/// The log of one session. Slots are filled in the order of their sequence.
pub(crate) struct CompletionLog {
    header: CompletionLogHeader,
}

impl CompletionLog {
    pub(crate) fn new(header: CompletionLogHeader) -> Self {
        CompletionLog { header }
    }

    /// How many completions it holds.
    pub(crate) fn slots(&self) -> u64 {
        u64::from(self.header.slot_count)
    }

    /// Records a completion. The caller made sure that the slot's earlier content is in the journal.
    pub(crate) fn store(&self, st: &mut dyn Storage, cseq: u64, entry: &Entry) {
        let slot = CompletionSlot { entry: *entry, cseq };
        st.store_log(
            self.header.slot_offset(cseq) as usize,
            &slot.encode(&self.header.uuid, self.header.epoch),
        );
    }

    /// Leaves word that a sync failed, for whoever opens the image next (P5).
    pub(crate) fn mark_failed(&mut self, st: &mut dyn Storage) {
        self.header.flags |= FLAG_SYNC_FAILED;
        st.store_log(0, &self.header.encode());
    }
}
