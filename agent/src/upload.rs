//! What other members ask of this node: pieces, sessions about a task, and tracker calls to its home.

pub mod serve;

pub use self::serve::Uploader;
