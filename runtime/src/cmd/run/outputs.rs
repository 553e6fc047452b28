//! Where answers go besides standard output.

use crate::tell::tell;
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vedge_runtime::Error;
use vedge_runtime::pipeline::{Model, Totals};
use vedge_runtime::sink::{Broker, Http, Mqtt, Outlet, Record, When};

/// Options of the other outputs.
#[derive(clap::Args)]
#[command(next_help_heading = "More outputs")]
pub struct Outputs {
    /// Show a live page at http://ADDRESS, with /snapshot.jpg, /events, /healthz and /metrics; such as 127.0.0.1:8080
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Let other machines see the page: --http may be an address that they reach, such as 0.0.0.0:8080
    #[arg(long, requires_all = ["http", "http_token"])]
    http_remote: bool,
    /// File with the token that clients of the page must give, /?token=TOKEN
    #[arg(long, value_name = "FILE", requires = "http")]
    http_token: Option<PathBuf>,
    /// Publish to an MQTT broker, mqtt://[USER@]HOST[:PORT]/TOPIC, mqtts:// for TLS: state, events, one answer a second; Home Assistant finds them
    #[arg(long, value_name = "URL")]
    mqtt: Option<Broker>,
    /// File with the password for the broker
    #[arg(long, value_name = "FILE", requires = "mqtt")]
    mqtt_password: Option<PathBuf>,
    /// File with the authorities (PEM) that may have signed the certificate of an mqtts:// broker [default: the system's]
    #[arg(long, value_name = "FILE", requires = "mqtt")]
    mqtt_ca: Option<PathBuf>,
    /// Keep frames in this folder, as JPEG files with their answers
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Which frames are kept: change, p<SHARE or label=LABEL; of the latter two at most one a second
    #[arg(long, value_name = "RULE", default_value = "change", requires = "record")]
    record_when: When,
    /// Most megabytes that kept frames take; the oldest are deleted
    #[arg(long, value_name = "MB", default_value = "500", requires = "record", value_parser = clap::value_parser!(u64).range(1..))]
    record_max: u64,
}

impl Outputs {
    /// Opens those that are asked for.
    pub fn open(&self, model: &Model, totals: &Arc<Totals>) -> Result<Vec<Outlet>> {
        let mut outlets = vec![];
        if let Some(address) = self.http {
            let token = self.http_token.as_deref().map(token).transpose()?;
            if !address.ip().is_loopback() && !self.http_remote {
                let what = format!("--http {address} can be reached from other machines");
                let hint = "say so with --http-remote and --http-token FILE, or use 127.0.0.1".into();
                return Err(Error::Usage { what, hint }.into());
            }
            let (http, bound) = Http::listen(address, token, Arc::clone(totals))?;
            tell(format_args!("page: http://{bound}/{}", if self.http_token.is_some() { "?token=…" } else { "" }));
            outlets.push(Outlet::new("http", Box::new(http))?);
        }
        if let Some(broker) = &self.mqtt {
            let password = self.mqtt_password.as_deref().map(secret).transpose()?;
            if password.is_some() != broker.user.is_some() {
                let what = "a broker that wants a login wants a name and a password".into();
                let hint = "give mqtt://USER@HOST/TOPIC and --mqtt-password FILE, or neither".into();
                return Err(Error::Usage { what, hint }.into());
            }
            if password.is_some() && !broker.tls && !local(&broker.host) {
                tell("warning: the broker's password is sent as it is to another machine; mqtts:// encrypts it");
            }
            if self.mqtt_ca.is_some() && !broker.tls {
                let what = "--mqtt-ca is for brokers over TLS".into();
                return Err(Error::Usage { what, hint: "write the address as mqtts://…".into() }.into());
            }
            let broker = Broker { password, authorities: self.mqtt_ca.clone(), ..broker.clone() };
            let warn = Box::new(|text: &str| tell(format_args!("warning: {text}")));
            outlets.push(Outlet::new("mqtt", Box::new(Mqtt::new(broker, &model.card().name, warn)?))?);
        }
        if let Some(dir) = &self.record {
            let warn = Box::new(|text: &str| tell(format_args!("warning: {text}")));
            let (when, most) = (self.record_when.clone(), self.record_max * 1_000_000);
            let record = Record::new(dir, when, most, Arc::clone(totals), warn)?;
            outlets.push(Outlet::new(&dir.display().to_string(), Box::new(record))?);
        }
        Ok(outlets)
    }
}

fn local(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A secret of one line.
fn secret(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let line = text.trim_end_matches(['\r', '\n']);
    if line.is_empty() || line.contains('\n') {
        let what = format!("{}: expected one line", path.display());
        return Err(Error::Usage { what, hint: String::new() }.into());
    }
    Ok(line.into())
}

/// A token that can stand in an address as it is.
fn token(path: &Path) -> Result<String> {
    let token = secret(path)?;
    if token.len() < 16 || !token.chars().all(|c| c.is_ascii_alphanumeric() || "-._~".contains(c)) {
        let what = format!("{}: expected a token of 16 or more letters and digits", path.display());
        let hint = "make one: head -c 24 /dev/urandom | base64 | tr -d '=+/' >FILE".into();
        return Err(Error::Usage { what, hint }.into());
    }
    Ok(token)
}
