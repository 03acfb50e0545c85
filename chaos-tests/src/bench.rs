//! The benchmark: how long a rollout takes, against the bound that its links set and against others on the same links.
//!
//! [`args`] says what is asked for, [`series`] lets the contestants take turns and repeats what the machine was too busy for,
//! [`play`] is one run: a world of the lab, Debian's docker-registry, shaped links, one [`contestants`] team, clients that
//! begin together. [`figures`] turns what was measured into ratios, for nothing else can be compared between machines.
//!
//! [`hit`] is apart from all that: one agent that has the blob, beside nginx.
//!
//! Not here: thresholds. What the figures should be stands in `docs/benchmarks.md`, and a machine with two cores misses some
//! of it for want of cores.

pub mod args;
pub mod series;

pub mod contestants;
pub mod course;
pub mod play;

pub mod join;
pub mod memory;
pub mod torrent;
pub mod tracker;

pub mod figures;

pub mod hit;
