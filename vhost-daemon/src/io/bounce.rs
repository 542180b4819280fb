//! Memory for what direct I/O cannot take as it is, bounded per disk.
//!
//! Guests choose how much of their I/O is unaligned in memory, so this memory is a resource that they
//! compete for. All threads of a disk share one [`Budget`]. Whoever finds it used up queues and is
//! woken in turn; one buffer is granted per turn, so that no thread starves another. Nobody waits with
//! a buffer in hand, and what the engine writes and reads for itself (journal, tree, superblocks) is
//! not counted and never waits: a buffer that a guest's transfer holds comes back when the kernel has
//! done that transfer, whatever else goes on.

use crate::event::Event;
use exd_file::AlignedBuf;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of bounce memory that the guest's requests of a disk have at most.
pub const BUDGET_BYTES: usize = 32 << 20;
/// Most bytes of one transfer that go through bounce memory.
pub const BOUNCE_BYTES: usize = 256 << 10;
/// Small transfers get no more than this.
const SMALL_BYTES: usize = 32 << 10;
/// Buffers of each size that are kept for the next transfer.
const SPARE_MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    alignment: usize,
    state: Mutex<State>,
    returned: Condvar,
    next_id: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    queue: VecDeque<Waiter>,
    small: Vec<AlignedBuf>,
    large: Vec<AlignedBuf>,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    event: Arc<Event>,
}

/// A buffer on loan.
#[derive(Debug)]
pub struct Loan {
    memory: AlignedBuf,
    counted: bool,
}

impl Loan {
    /// The memory, at least as much as was asked for.
    pub fn memory(&mut self) -> &mut AlignedBuf {
        &mut self.memory
    }

    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        &self.memory
    }
}

impl Budget {
    /// A budget of `limit` bytes in buffers at multiples of `alignment`, a power of two.
    pub fn new(limit: usize, alignment: usize) -> Budget {
        assert!(limit >= BOUNCE_BYTES + alignment, "the largest transfer can be granted");
        Budget {
            limit,
            alignment,
            state: Mutex::default(),
            returned: Condvar::new(),
            next_id: AtomicU64::new(0),
        }
    }

    /// Bytes on loan that count.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.state().used
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size_for(&self, need: usize) -> usize {
        if need <= SMALL_BYTES { SMALL_BYTES } else { BOUNCE_BYTES + self.alignment }
    }

    fn buffer(&self, state: &mut State, size: usize) -> AlignedBuf {
        let spare = if size == SMALL_BYTES { &mut state.small } else { &mut state.large };
        spare.pop().unwrap_or_else(|| AlignedBuf::new(size, self.alignment))
    }
}

/// A thread's access to the budget.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    event: Arc<Event>,
    id: u64,
}

impl Account {
    /// Access for the thread that `event` wakes.
    pub fn new(budget: Arc<Budget>, event: Arc<Event>) -> Account {
        let id = budget.next_id.fetch_add(1, Ordering::Relaxed);
        Account { budget, event, id }
    }

    /// A buffer of at least `need` bytes, or `None` if it is not our turn or there is none: the event
    /// is signalled when it is worth another attempt.
    pub fn borrow(&self, need: usize) -> Option<Loan> {
        let budget = &*self.budget;
        let size = budget.size_for(need);
        let mut state = budget.state();
        let turn = state.queue.front().is_none_or(|front| front.id == self.id);
        if !turn || state.used + size > budget.limit {
            if !state.queue.iter().any(|waiter| waiter.id == self.id) {
                state.queue.push_back(Waiter { id: self.id, event: self.event.clone() });
            }
            return None;
        }
        state.used += size;
        state.queue.pop_front();
        // There may be enough for the next one too.
        if let Some(next) = state.queue.front() {
            next.event.signal();
        }
        let memory = budget.buffer(&mut state, size);
        Some(Loan { memory, counted: true })
    }

    /// A buffer for the engine's own data, which never waits.
    pub fn borrow_uncounted(&self, need: usize) -> Loan {
        let size = self.budget.size_for(need);
        let memory = self.budget.buffer(&mut self.budget.state(), size);
        Loan { memory, counted: false }
    }

    /// Gives a buffer back.
    pub fn give_back(&self, loan: Loan) {
        let budget = &*self.budget;
        let mut state = budget.state();
        let size = loan.memory.len();
        if loan.counted {
            state.used -= size;
        }
        let spare = if size == SMALL_BYTES { &mut state.small } else { &mut state.large };
        if spare.len() < SPARE_MAX {
            spare.push(loan.memory);
        }
        if let Some(next) = state.queue.front() {
            next.event.signal();
            budget.returned.notify_all();
        }
    }

    /// Waits a little for something to come back. For a caller that has nothing else to wait for.
    pub fn wait(&self) {
        let state = self.budget.state();
        let pause = Duration::from_millis(10);
        let _ = self.budget.returned.wait_timeout(state, pause);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut state = self.budget.state();
        state.queue.retain(|waiter| waiter.id != self.id);
        if let Some(next) = state.queue.front() {
            next.event.signal();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(budget: &Arc<Budget>) -> Account {
        Account::new(budget.clone(), Arc::new(Event::new().expect("event")))
    }

    #[test]
    fn turns_are_taken_one_after_another() {
        let size = BOUNCE_BYTES + 4096;
        let budget = Arc::new(Budget::new(2 * size, 4096));
        let (a, b) = (account(&budget), account(&budget));
        let first = a.borrow(BOUNCE_BYTES).expect("room");
        let second = a.borrow(BOUNCE_BYTES).expect("room");
        assert!(b.borrow(1 << 20 >> 4).is_none());
        assert!(a.borrow(BOUNCE_BYTES).is_none());
        a.give_back(first);
        // `b` came first, although `a` asks sooner.
        assert!(a.borrow(BOUNCE_BYTES).is_none());
        let third = b.borrow(BOUNCE_BYTES).expect("its turn");
        assert!(b.borrow(BOUNCE_BYTES).is_none());
        b.give_back(third);
        let fourth = a.borrow(BOUNCE_BYTES).expect("now `a`");
        assert_eq!(budget.used(), 2 * size);
        // The engine's own data does not wait.
        a.give_back(b.borrow_uncounted(BOUNCE_BYTES));
        a.give_back(second);
        a.give_back(fourth);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn who_leaves_does_not_block_the_rest() {
        let budget = Arc::new(Budget::new(BOUNCE_BYTES + 4096, 4096));
        let (a, b) = (account(&budget), account(&budget));
        let held = a.borrow(BOUNCE_BYTES).expect("room");
        let c = account(&budget);
        assert!(c.borrow(1).is_none());
        assert!(b.borrow(1).is_none());
        a.give_back(held);
        drop(c);
        assert!(b.borrow(1).is_some());
    }
}
