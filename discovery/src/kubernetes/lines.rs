//! Cuts a stream of bytes into lines of a bounded length. Pure.

/// A line that is longer than it may be. The server's fault; what follows cannot be understood either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {max} bytes")]
pub(super) struct TooLong {
    max: usize,
}

/// What has come of the line that is not complete yet.
#[derive(Debug)]
pub(super) struct Lines {
    partial: Vec<u8>,
    max: usize,
}

impl Lines {
    pub(super) fn new(max: usize) -> Self {
        Self { partial: Vec::new(), max }
    }

    /// The lines that end within `bytes`, without their ends; empty ones are left out.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, TooLong> {
        let mut lines = Vec::new();
        let mut pieces = bytes.split(|byte| *byte == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            if self.partial.len() + piece.len() > self.max {
                return Err(TooLong { max: self.max });
            }
            self.partial.extend_from_slice(piece);
            // The last piece has no end yet.
            if pieces.peek().is_some() && !self.partial.is_empty() {
                lines.push(std::mem::take(&mut self.partial));
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_bounded() {
        let mut lines = Lines::new(4);
        assert_eq!(lines.push(b"abcd\nab").unwrap(), [b"abcd"]);
        assert_eq!(lines.push(b"cde"), Err(TooLong { max: 4 }));
    }

    proptest! {
        /// However the bytes are cut, the same lines come out.
        #[test]
        fn cuts_do_not_matter(chunks in prop::collection::vec("[ab\n]{0,6}", 0..12)) {
            let whole = chunks.concat();
            let ended = whole.rfind('\n').map_or("", |end| &whole[..end]);
            let expected: Vec<_> = ended.split('\n').filter(|line| !line.is_empty()).map(|l| l.as_bytes().to_vec()).collect();
            let mut lines = Lines::new(whole.len());
            let mut found = Vec::new();
            for chunk in &chunks {
                found.extend(lines.push(chunk.as_bytes()).unwrap());
            }
            prop_assert_eq!(found, expected);
        }
    }
}
