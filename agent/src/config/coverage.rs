//! Whether clients will believe the certificates of hijacked hosts: what is likely to have been forgotten.
//!
//! Warnings only. A proxy that does not start is a failed pull everywhere, an expired CA only for hijacked hosts.

use std::net::IpAddr;

use x509_parser::extensions::{GeneralName, NameConstraints};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::hosts::HostPattern;
use super::types::Identity;

/// What clients will not like about an identity that is to stand for `hosts`.
pub(super) fn warnings(identity: &Identity, hosts: &[HostPattern]) -> Vec<String> {
    let file = identity.cert_file.display();
    let Some(Ok((_, certificate))) = identity.chain.first().map(|first| X509Certificate::from_der(first)) else {
        return Vec::new();
    };
    let mut warnings = Vec::new();
    if !certificate.validity().is_valid() {
        let (from, to) = (certificate.validity().not_before, certificate.validity().not_after);
        warnings.push(format!("hijack.cert: {file} is valid from {from} to {to}, which is not now"));
    }
    for host in hosts.iter().filter(|host| !stands_for(&certificate, host)) {
        warnings.push(format!(
            "hijack.hosts: {host} is not among the names that {file} is good for; clients will refuse it"
        ));
    }
    warnings
}

/// Whether the certificate is good for a host: by its constraints if it is a CA, by its names if not.
fn stands_for(certificate: &X509Certificate<'_>, host: &HostPattern) -> bool {
    if certificate.is_ca() {
        let Ok(Some(constraints)) = certificate.name_constraints() else { return true };
        return permits(constraints.value, host);
    }
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return false };
    names.value.general_names.iter().any(|name| match name {
        GeneralName::DNSName(name) => match (name.strip_prefix("*."), host.below) {
            (Some(suffix), true) => suffix.eq_ignore_ascii_case(&host.host.host),
            // A wildcard stands for exactly one label.
            (Some(suffix), false) => {
                host.host.host.split_once('.').is_some_and(|(_, parent)| suffix.eq_ignore_ascii_case(parent))
            }
            (None, below) => !below && name.eq_ignore_ascii_case(&host.host.host),
        },
        GeneralName::IPAddress(bytes) => ip(host).is_some_and(|ip| octets(ip) == *bytes),
        _ => false,
    })
}

fn permits(constraints: &NameConstraints<'_>, host: &HostPattern) -> bool {
    let covers = |base: &GeneralName<'_>| match (base, ip(host)) {
        (GeneralName::DNSName(base), None) => below(&host.host.host, base),
        (GeneralName::IPAddress(base), Some(ip)) => in_subnet(&octets(ip), base),
        _ => false,
    };
    let same_kind = |base: &GeneralName<'_>| match base {
        GeneralName::DNSName(_) => ip(host).is_none(),
        GeneralName::IPAddress(_) => ip(host).is_some(),
        _ => false,
    };
    let permitted = constraints.permitted_subtrees.as_deref().unwrap_or_default();
    let excluded = constraints.excluded_subtrees.as_deref().unwrap_or_default();
    let constrained = permitted.iter().any(|subtree| same_kind(&subtree.base));
    (!constrained || permitted.iter().any(|subtree| covers(&subtree.base)))
        && !excluded.iter().any(|subtree| covers(&subtree.base))
}

/// Whether a name is `base` or below it, RFC 5280 section 4.2.1.10. An empty base is above everything.
fn below(name: &str, base: &str) -> bool {
    let base = base.trim_start_matches('.').to_ascii_lowercase();
    base.is_empty() || name == base || name.strip_suffix(&base).is_some_and(|rest| rest.ends_with('.'))
}

/// Whether an address is in a subnet, given as address and mask behind each other.
fn in_subnet(address: &[u8], subnet: &[u8]) -> bool {
    let Some((base, mask)) = subnet.split_at_checked(address.len()).filter(|(base, mask)| base.len() == mask.len())
    else {
        return false;
    };
    address.iter().zip(base).zip(mask).all(|((a, b), mask)| a & mask == b & mask)
}

fn ip(host: &HostPattern) -> Option<IpAddr> {
    host.host.host.parse().ok()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
