//! Workers as the prefix index knows them: a small number each, and how much they took since they came.

/// A worker's number, until it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u32);

impl Slot {
    /// As an index into a table by slot.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Somebody who holds a run, and when it took it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holder {
    pub slot: Slot,
    pub stamp: u64,
}

#[derive(Debug, Clone, Copy)]
struct Seat {
    /// Blocks taken by all who sat here.
    taken: u64,
    /// What was taken up to here was somebody else's.
    since: u64,
    /// Blocks of its pool.
    room: u64,
    is_taken: bool,
    /// Blocks that it took lately, as of `at` of [`Seats::taken`].
    lately: f64,
    at: u64,
}

/// All seats. As many as there were workers at once.
#[derive(Debug, Default)]
pub(super) struct Seats {
    seats: Vec<Seat>,
    free: Vec<u32>,
    /// Blocks that all of them took.
    taken: u64,
    /// Blocks of all pools.
    room: u64,
}

impl Seats {
    pub fn len(&self) -> usize {
        self.seats.len()
    }

    pub fn join(&mut self, pool_blocks: usize) -> Slot {
        let id = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Seat { taken: 0, since: 0, room: 0, is_taken: false, lately: 0.0, at: 0 });
            (self.seats.len() - 1) as u32
        });
        let room = pool_blocks.max(1) as u64;
        self.room += room;
        let seat = &mut self.seats[id as usize];
        *seat = Seat { since: seat.taken, room, is_taken: true, lately: 0.0, ..*seat };
        Slot(id)
    }

    pub fn leave(&mut self, slot: Slot) {
        let seat = &mut self.seats[slot.index()];
        if std::mem::take(&mut seat.is_taken) {
            self.room -= seat.room;
            self.free.push(slot.0);
        }
    }

    pub fn is_taken(&self, slot: Slot) -> bool {
        self.seats[slot.index()].is_taken
    }

    /// So many blocks more; the stamp of now.
    pub fn took(&mut self, slot: Slot, blocks: usize) -> u64 {
        self.taken += blocks as u64;
        let lately = self.lately(slot) + blocks as f64;
        let seat = &mut self.seats[slot.index()];
        (seat.lately, seat.at) = (lately, self.taken);
        seat.taken += blocks as u64;
        seat.taken
    }

    /// What it took while all of them together took as much as their pools hold, older blocks counting less.
    fn lately(&self, slot: Slot) -> f64 {
        let seat = &self.seats[slot.index()];
        let passed = (self.taken - seat.at) as f64;
        seat.lately * (-passed / self.room.max(1) as f64).exp()
    }

    /// How often its pool is taken anew while the average pool is once.
    pub fn churn(&self, slot: Slot) -> f64 {
        self.lately(slot) / self.seats[slot.index()].room as f64
    }

    /// Whether its pool may still have what it took then.
    pub fn holds(&self, holder: &Holder) -> bool {
        let seat = &self.seats[holder.slot.index()];
        seat.is_taken && holder.stamp > seat.since && seat.taken - holder.stamp < seat.room
    }
}
