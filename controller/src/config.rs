//! The command line, checked.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Watches the custom resources of a cluster and gives work to the agents on its nodes.
#[derive(Debug, Parser)]
#[command(name = "ebackup-controller", version)]
pub struct CommandLine {
    #[command(flatten)]
    options: Options,
    /// What to do instead of running.
    #[command(subcommand)]
    pub instead: Option<Instead>,
}

/// What the program does instead of running.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Instead {
    /// Print the definitions of the custom resources, as YAML.
    ///
    /// Example: ebackup-controller crds | kubectl apply -f -
    Crds,
}

impl CommandLine {
    /// Checks what belongs together.
    ///
    /// # Errors
    /// When options contradict one another.
    pub fn config(self) -> Result<Config> {
        self.options.config()
    }
}

#[derive(Debug, Args)]
struct Options {
    /// Namespace of the program, its agents and its custom resources.
    #[arg(long, env = "EBACKUP_NAMESPACE", default_value = "velero", value_parser = dns_label)]
    namespace: String,
    /// Name of this controller among its replicas: that of its pod.
    #[arg(long, env = "POD_NAME", default_value = "ebackup-controller")]
    identity: String,
    /// Volumes that are saved or restored at once in the cluster.
    #[arg(long, env = "EBACKUP_VOLUME_WORKERS", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    volume_workers: u32,
    /// Of them on one node; 0: as many as its agent can do.
    #[arg(long, env = "EBACKUP_NODE_VOLUME_WORKERS", default_value_t = 0)]
    node_volume_workers: u32,
    /// Address that agents connect to.
    #[arg(long, env = "EBACKUP_LISTEN", default_value = "0.0.0.0:7443")]
    listen: SocketAddr,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, env = "EBACKUP_HTTP", default_value = "0.0.0.0:8085")]
    http: SocketAddr,
    /// Names and addresses that agents know the controller by, with commas. Default: those of the Service
    /// 'ebackup-controller'.
    #[arg(long, env = "EBACKUP_SERVICE_NAMES", value_delimiter = ',', value_parser = server_name)]
    service_names: Vec<String>,
    /// ServiceAccount of the agents.
    #[arg(long, env = "EBACKUP_AGENT_SERVICE_ACCOUNT", default_value = "node-agent")]
    agent_service_account: String,
    /// Minutes without progress that end a job; 0: never.
    #[arg(long, env = "EBACKUP_STALL_MINUTES", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    stall_minutes: u32,
    /// Seconds after which the jobs of an agent that is away no longer count as running.
    #[arg(long, env = "EBACKUP_AGENT_LOST_SECONDS", default_value_t = 60)]
    agent_lost_seconds: u32,
    /// Minutes after which the jobs of an agent that is away fail.
    #[arg(long, env = "EBACKUP_AGENT_LOST_MINUTES", default_value_t = 10)]
    agent_lost_minutes: u32,
    /// Bytes a second that one job may upload, with K, M or G behind it; 0: no limit.
    #[arg(long, env = "EBACKUP_LIMIT_UPLOAD", default_value = "0", value_parser = size)]
    limit_upload: u64,
    /// Bytes a second that one job may download, with K, M or G behind it; 0: no limit.
    #[arg(long, env = "EBACKUP_LIMIT_DOWNLOAD", default_value = "0", value_parser = size)]
    limit_download: u64,
    /// Hours between two prunes of a repository; 0: never.
    #[arg(long, env = "EBACKUP_PRUNE_EVERY", value_name = "HOURS", default_value_t = 24,
        value_parser = clap::value_parser!(u32).range(0..=100_000))]
    prune_every: u32,
    /// Form of the log.
    #[arg(long, env = "EBACKUP_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug or trace; also by module, as 'info,controller=debug'.
    #[arg(long, env = "EBACKUP_LOG_LEVEL", default_value = "info")]
    log_level: String,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// How the controller works. Holds no secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Of the program, its agents and its custom resources.
    pub namespace: String,
    /// Of this controller among its replicas.
    pub identity: String,
    /// Volumes that are saved or restored at once; at least 1.
    pub volume_workers: u32,
    /// Of them on one node; none: as many as its agent can do.
    pub node_volume_workers: Option<u32>,
    /// Where agents connect to.
    pub listen: SocketAddr,
    /// Of metrics and probes.
    pub http: SocketAddr,
    /// What agents know the controller by; at least one.
    pub service_names: Vec<String>,
    /// Of the agents.
    pub agent_service_account: String,
    /// Time without progress that ends a job; none: never.
    pub stall: Option<Duration>,
    /// After it, the jobs of an agent that is away no longer count as running.
    pub agent_lost: Duration,
    /// After it, they fail. At least `agent_lost`.
    pub agent_gone: Duration,
    /// Bytes a second of one job; 0: no limit.
    pub limit_upload: u64,
    /// Bytes a second of one job; 0: no limit.
    pub limit_download: u64,
    /// Between two prunes of a repository; none: never.
    pub prune_every: Option<Duration>,
    /// Of the log.
    pub log_format: LogFormat,
    /// Filter of the log.
    pub log_level: String,
}

impl Options {
    fn config(self) -> Result<Config> {
        const MINUTE: u64 = 60;
        const HOUR: u64 = 60 * MINUTE;
        let seconds = |number: u32, unit: u64| Duration::from_secs(u64::from(number) * unit);
        let or_never = |time: Duration| (!time.is_zero()).then_some(time);
        let agent_lost = seconds(self.agent_lost_seconds, 1);
        let agent_gone = seconds(self.agent_lost_minutes, MINUTE);
        ensure!(
            agent_lost <= agent_gone,
            "--agent-lost-minutes {} is less than --agent-lost-seconds {}: jobs of an agent must not \
             fail before they stop to count",
            self.agent_lost_minutes,
            self.agent_lost_seconds
        );
        ensure!(
            self.node_volume_workers <= self.volume_workers,
            "--node-volume-workers {} is more than --volume-workers {}, which is for all nodes",
            self.node_volume_workers,
            self.volume_workers
        );
        let service_names = if self.service_names.is_empty() {
            service_names(&self.namespace)
        } else {
            self.service_names
        };
        Ok(Config {
            namespace: self.namespace,
            identity: self.identity,
            volume_workers: self.volume_workers,
            node_volume_workers: (self.node_volume_workers > 0).then_some(self.node_volume_workers),
            listen: self.listen,
            http: self.http,
            service_names,
            agent_service_account: self.agent_service_account,
            stall: or_never(seconds(self.stall_minutes, MINUTE)),
            agent_lost,
            agent_gone,
            limit_upload: self.limit_upload,
            limit_download: self.limit_download,
            prune_every: or_never(seconds(self.prune_every, HOUR)),
            log_format: self.log_format,
            log_level: self.log_level,
        })
    }
}

/// The names that a Service has inside a cluster.
fn service_names(namespace: &str) -> Vec<String> {
    let service = "ebackup-controller";
    ["", ".svc", ".svc.cluster.local"]
        .map(|suffix| format!("{service}.{namespace}{suffix}"))
        .into_iter()
        .chain([service.to_owned()])
        .collect()
}

fn dns_label(text: &str) -> Result<String, String> {
    let is_fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if text.is_empty() || text.len() > 63 || !text.bytes().all(is_fine) {
        return Err("a namespace has 1 to 63 small letters, digits and '-'".to_owned());
    }
    Ok(text.to_owned())
}

fn server_name(text: &str) -> Result<String, String> {
    match rustls::pki_types::ServerName::try_from(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("neither the name of a host nor an IP address".to_owned()),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "a size is a number with K, M or G behind it".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<Config> {
        let arguments = std::iter::once(&"ebackup-controller").chain(arguments);
        CommandLine::try_parse_from(arguments)?.config()
    }

    #[test]
    fn the_defaults_are_those_of_a_usual_cluster() {
        let config = config(&[]).unwrap();
        assert_eq!((config.volume_workers, config.node_volume_workers), (3, None));
        assert_eq!(config.stall, Some(Duration::from_secs(1800)));
        assert_eq!(config.agent_gone, Duration::from_secs(600));
        assert_eq!(config.prune_every, Some(Duration::from_secs(86_400)));
        assert!(config.service_names.contains(&"ebackup-controller.velero.svc".to_owned()));
    }

    #[test]
    fn options_are_read_and_zero_means_what_it_says() {
        let all = ["--namespace=a", "--limit-upload=8M", "--stall-minutes=0", "--prune-every=0"];
        let names = config(&["--service-names=a.example,192.0.2.1"]).unwrap().service_names;
        assert_eq!(names, ["a.example", "192.0.2.1"]);
        let config = config(&all).unwrap();
        assert_eq!((config.limit_upload, config.limit_download), (8 << 20, 0));
        assert_eq!((config.stall, config.prune_every), (None, None));
        assert!(config.service_names.contains(&"ebackup-controller.a.svc".to_owned()));
    }

    #[test]
    fn nonsense_is_refused() {
        let wrong: [&[&str]; 9] = [
            &["--namespace="],
            &["--namespace=a/b"],
            &["--volume-workers=0"],
            &["--volume-workers=2", "--node-volume-workers=3"],
            &["--agent-lost-seconds=60", "--agent-lost-minutes=0"],
            &["--limit-upload=1X"],
            &["--limit-download=99999999999G"],
            &["--service-names=not a name"],
            &["--listen=7443"],
        ];
        for arguments in wrong {
            assert!(config(arguments).is_err(), "{arguments:?}");
        }
    }
}
