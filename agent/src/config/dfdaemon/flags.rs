//! `dfget_flags`: what dfdaemon v1 gave to every `dfget` that it ran.

use super::{Import, Node, Place, number, text};
use crate::config::build;

/// Short names of flags.
const SHORT: [(&str, &str); 9] = [
    ("-u", "--url"),
    ("-o", "--output"),
    ("-s", "--locallimit"),
    ("-e", "--timeout"),
    ("-m", "--md5"),
    ("-i", "--identifier"),
    ("-p", "--pattern"),
    ("-f", "--filter"),
    ("-n", "--node"),
];

/// Flags that take no value.
const SWITCHES: [&str; 7] = ["--insecure", "--notbs", "--dfdaemon", "--showbar", "-b", "--console", "--verbose"];

/// What is said of a flag that has no counterpart. Others are unknown.
const LEFT_OUT: [(&str, &str); 18] = [
    ("--alivetime", "left out: serving peers is the agent's work for as long as it runs"),
    ("--node", "left out: there is no supernode; members find each other"),
    ("--home", "left out: cache.dir is /var/lib/darter unless it is set, and v1's files are of no use"),
    ("--locallimit", build::NO_LIMITS),
    ("--totallimit", build::NO_LIMITS),
    ("--minrate", "left out: timeouts do not depend on a rate"),
    ("--timeout", "left out: what stands still is noticed, however long a blob takes"),
    ("--filter", "left out: blobs are known by their digest, whatever the URL says"),
    ("--identifier", "left out: blobs are known by their digest"),
    ("--md5", "left out: blobs are known by their digest"),
    ("--callsystem", "left out: metrics name no caller"),
    ("--pattern", "left out: the swarm is asked first, the registry where it does not help"),
    ("--clientqueue", "left out: pieces are written as they come"),
    ("--cacerts", "left out: name the registry in registries, with ca_file"),
    ("--insecure", super::INSECURE),
    ("--notbs", "left out: where the swarm does not help the registry is asked, always"),
    ("--verbose", "left out: DARTER_LOG=debug in the agent's environment does that"),
    ("--header", "left out: clients send their own headers"),
];

/// What dfdaemon sets by itself, and what shows something on a terminal. Nothing is lost with them.
const SILENT: [&str; 4] = ["--dfdaemon", "--showbar", "-b", "--console"];

impl<'a> Import<'a> {
    /// Takes over what has a counterpart, and notes the rest, flag by flag.
    pub(super) fn dfget_flags(&mut self, node: &'a Node) {
        const PATH: &str = "dfget_flags";
        let Some(items) = self.reader.list(node, PATH) else { return };
        let words = items.iter().filter_map(|item| Some((item, self.reader.scalar(item, PATH, text)?)));
        let words: Vec<(&Node, String)> = words.collect();
        let mut words = words.into_iter();
        while let Some((at, word)) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            let name = SHORT.iter().find(|(short, _)| *short == name).map_or(name, |(_, long)| *long);
            let (place, value) = match (inline, SWITCHES.contains(&name)) {
                (Some(value), _) => (at, value),
                (None, true) => (at, String::new()),
                (None, false) => match words.next() {
                    Some((node, value)) => (node, value),
                    None => {
                        self.reader.problem_at(&at.place, PATH, format!("{name} has no value"));
                        return;
                    }
                },
            };
            self.dfget_flag(at, name, place, value);
        }
    }

    fn dfget_flag(&mut self, at: &Node, name: &str, place: &Node, value: String) {
        let key = format!("dfget_flags {name}");
        match name {
            "--ip" if value == "0.0.0.0" || value == "::" => {
                self.note(&at.place, &key, "left out: nobody can be reached there; the agent finds its address itself");
            }
            "--ip" => {
                self.source("node.advertise", &key, place);
                self.out.node.advertise = Some(value);
            }
            "--port" => match number(&value) {
                Ok(0) => {}
                Ok(port) => {
                    self.source("peer.listen", &key, place);
                    self.peer_port(port);
                }
                Err(message) => self.reader.problem_at(&place.place, key, message),
            },
            "--expiretime" => {
                self.source("cache.idle", &key, place);
                self.out.cache.idle = Some(value);
                let message = "became cache.idle; without it blobs are kept for 1h, so that late nodes still find them";
                self.note(&at.place, &key, message);
            }
            _ if SILENT.contains(&name) => {}
            _ => {
                let known = LEFT_OUT.iter().find(|(flag, _)| *flag == name);
                self.unmatched(&at.place, &key, known.map_or("left out: not a flag of dfget v1", |(_, why)| *why));
            }
        }
    }

    fn unmatched(&mut self, place: &Place, key: &str, why: &str) {
        let why = if why.starts_with("left out") { why.to_owned() } else { format!("left out: {why}") };
        self.note(place, key, why);
    }
}
