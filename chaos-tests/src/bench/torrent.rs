//! A torrent of an image's blobs, as somebody would make it who rolls images out by BitTorrent.

use std::fs;

use anyhow::{Context as _, Result};
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use crate::lab::image::Image;

/// What the agents cut blobs of up to 256 MiB into, too.
pub const PIECE_BYTES: usize = 256 << 10;

/// The torrent's name, which is also the directory of its files. With a web seed's address before it and a file's name behind
/// it, it is the blob's address at the registry (BEP 19).
pub const NAME: &str = "blobs";

/// The torrent's file: all blobs in the manifest's order (BEP 3), a tracker, and web seeds if there are any.
pub fn metainfo(image: &Image, tracker: &str, web_seed: Option<&str>) -> Result<Vec<u8>> {
    let (mut pieces, mut rest, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for blob in &image.blobs {
        let hex = blob.digest.strip_prefix("sha256:").context("an odd digest")?;
        rest.extend(fs::read(image.layout.join("blobs/sha256").join(hex))?);
        let whole = rest.len() / PIECE_BYTES * PIECE_BYTES;
        pieces.extend(rest.drain(..whole).as_slice().chunks(PIECE_BYTES).flat_map(sha1));
        files.push(Item::Dict(vec![
            ("length", Item::Number(blob.bytes)),
            ("path", Item::List(vec![Item::text(&blob.digest)])),
        ]));
    }
    if !rest.is_empty() {
        pieces.extend(sha1(&rest));
    }
    let info = Item::Dict(vec![
        ("files", Item::List(files)),
        ("name", Item::text(NAME)),
        ("piece length", Item::Number(PIECE_BYTES as u64)),
        ("pieces", Item::Bytes(pieces)),
    ]);
    let mut all = vec![("announce", Item::text(tracker)), ("info", info)];
    if let Some(web_seed) = web_seed {
        all.push(("url-list", Item::List(vec![Item::text(web_seed)])));
    }
    let mut bytes = Vec::new();
    Item::Dict(all).write(&mut bytes);
    Ok(bytes)
}

fn sha1(piece: &[u8]) -> Vec<u8> {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, piece).as_ref().to_vec()
}

/// What bencoding knows. Keys of a dictionary have to come sorted.
pub(super) enum Item {
    Number(u64),
    Bytes(Vec<u8>),
    List(Vec<Item>),
    Dict(Vec<(&'static str, Item)>),
}

impl Item {
    fn text(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Number(number) => out.extend(format!("i{number}e").bytes()),
            Self::Bytes(bytes) => {
                out.extend(format!("{}:", bytes.len()).bytes());
                out.extend(bytes);
            }
            Self::List(items) => {
                out.push(b'l');
                items.iter().for_each(|item| item.write(out));
                out.push(b'e');
            }
            Self::Dict(entries) => {
                out.push(b'd');
                for (key, value) in entries {
                    Self::text(key).write(out);
                    value.write(out);
                }
                out.push(b'e');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_torrent_has_the_blobs_in_order_and_their_pieces_across_files() {
        let dir = tempfile::tempdir().unwrap();
        let image = Image::of_noise(dir.path(), "x", &[PIECE_BYTES, 10]).unwrap();
        let torrent = metainfo(&image, "http://t/announce", Some("http://r/v2/lab/image/")).unwrap();
        let text = String::from_utf8_lossy(&torrent).into_owned();
        assert!(text.starts_with("d8:announce17:http://t/announce4:infod5:filesl"), "{text}");
        assert!(text.ends_with("8:url-listl22:http://r/v2/lab/image/ee"), "{text}");
        let positions = image.blobs.iter().map(|blob| text.find(&format!("4:pathl71:{}ee", blob.digest)).unwrap());
        assert!(positions.is_sorted(), "{text}");

        let mut all = Vec::new();
        for blob in &image.blobs {
            all.extend(fs::read(dir.path().join("blobs/sha256").join(&blob.digest[7..])).unwrap());
        }
        assert_eq!(all.len().div_ceil(PIECE_BYTES), 2);
        let pieces = [sha1(&all[..PIECE_BYTES]), sha1(&all[PIECE_BYTES..])].concat();
        let entry = [b"6:pieces40:".as_slice(), &pieces, b"ee"].concat();
        assert!(torrent.windows(entry.len()).any(|window| window[..entry.len() - 1] == entry[..entry.len() - 1]));
        assert!(metainfo(&image, "t", None).unwrap().ends_with(b"ee"));
    }

    #[test]
    fn bencoding_is_as_bep_3_has_it() {
        let item =
            Item::Dict(vec![("a", Item::List(vec![Item::Number(0), Item::Bytes(vec![0xff])])), ("b", Item::text(""))]);
        let mut out = Vec::new();
        item.write(&mut out);
        assert_eq!(out, b"d1:ali0e1:\xffe1:b0:e");
    }
}
