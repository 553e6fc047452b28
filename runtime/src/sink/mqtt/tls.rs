//! TLS 1.2 and 1.3 to a broker whose certificate an authority of this machine, or one that is named, has signed.

use crate::error::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

/// Where systems keep the authorities that they trust: Debian, Fedora, Alpine.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Who is trusted, and who the other side must be.
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Tls {
    /// Trusts the authorities of a PEM file, or else those of the system.
    ///
    /// # Errors
    /// [`Error::Usage`] for a file without certificates, a system without authorities, or a name that no certificate can have.
    pub fn new(host: &str, authorities: Option<&Path>) -> Result<Tls> {
        let usage = |what: String, hint: &str| Error::Usage { what, hint: hint.into() };
        let system = || SYSTEM.map(Path::new).into_iter().find(|p| p.exists());
        let file = authorities.or_else(system).ok_or_else(|| {
            usage("this system has no authorities for TLS".into(), "install ca-certificates, or give --mqtt-ca FILE")
        })?;
        let bad = |why: String| {
            usage(
                format!("{}: {why}", file.display()),
                "it must hold certificates of authorities, -----BEGIN CERTIFICATE-----",
            )
        };
        let certificates = CertificateDer::pem_file_iter(file).map_err(|e| bad(e.to_string()))?;
        let certificates = certificates.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| bad(e.to_string()))?;
        let mut roots = RootCertStore::empty();
        // systems hold a few that are too old to be read
        let (good, ignored) = roots.add_parsable_certificates(certificates);
        if good == 0 || (authorities.is_some() && ignored > 0) {
            return Err(bad(format!("{good} certificates that can be read, {ignored} that cannot")));
        }
        let provider = rustls::crypto::ring::default_provider().into();
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host.to_string())
            .map_err(|_| usage(format!("`{host}` is no name that a certificate can have"), ""))?;
        Ok(Tls { config: config.into(), name })
    }

    /// Encrypts a connection; whether the other side is whom it must be shows at the first message.
    pub fn over(&self, stream: TcpStream) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        let connection =
            ClientConnection::new(Arc::clone(&self.config), self.name.clone()).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, stream))
    }
}
