//! The command line as typed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use chunkstore::codec::compress::Level;
use clap::builder::FalseyValueParser;
use clap::builder::styling::Styles;
use clap::parser::ValueSource;
use clap::{Args as ClapArgs, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use objects::{ObjectStore, Traffic};

use crate::backup::ChangedBy;
use crate::restore::Overwrite;

/// Deduplicating, compressing, encrypting backups.
///
/// Example: save a folder, and get it back.
///
///   ebackup --repo /srv/backup backup --init /home/me
///   ebackup --repo /srv/backup restore latest --target /tmp/me
#[derive(Parser)]
#[command(name = "ebackup", version, verbatim_doc_comment, styles = Styles::plain())]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(ClapArgs, Clone)]
pub(super) struct Global {
    /// The repository: a folder, or s3://bucket/prefix.
    #[arg(long, short, global = true, env = "EBACKUP_REPO", value_name = "REPO")]
    pub(super) repo: Option<String>,
    #[command(flatten)]
    pub(super) s3: S3,
    /// File whose first line is the password. Else EBACKUP_PASSWORD is used, if set.
    #[arg(long, global = true, env = "EBACKUP_PASSWORD_FILE", value_name = "FILE")]
    pub(super) password_file: Option<PathBuf>,
    /// Key file. Without any secret, the one that 'init' made for this repository is used.
    #[arg(long, global = true, env = "EBACKUP_KEY_FILE", value_name = "FILE")]
    pub(super) key_file: Option<PathBuf>,
    /// Memory the program may use, at least 96M [default: 256M, or 75 % of the control group's
    /// limit if that is less].
    #[arg(long, global = true, env = "EBACKUP_MEMORY", value_name = "SIZE", value_parser = memory)]
    pub(super) memory: Option<u64>,
    /// Print JSON, one object a line; the last one is the summary.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Print no progress.
    #[arg(long, short, global = true)]
    pub(super) quiet: bool,
    /// Environment variable with the password.
    #[arg(skip = "EBACKUP_PASSWORD")]
    pub(super) password_variable: &'static str,
    /// Stores opened so far, whose traffic the summary tells.
    #[arg(skip)]
    pub(super) opened: Opened,
    /// Files with secrets that were read.
    #[arg(skip)]
    pub(super) secrets: SecretFiles,
}

/// What was in files with secrets, by path: each is read once, since it may be a pipe.
#[derive(Clone, Default)]
pub(super) struct SecretFiles(Arc<Mutex<HashMap<PathBuf, Arc<Vec<u8>>>>>);

impl SecretFiles {
    /// The content of the file.
    ///
    /// # Errors
    /// Those of reading it the first time.
    pub(super) fn read(&self, path: &Path) -> std::io::Result<Arc<Vec<u8>>> {
        let mut read = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = read.get(path) {
            return Ok(known.clone());
        }
        let content = Arc::new(std::fs::read(path)?);
        read.insert(path.to_owned(), content.clone());
        Ok(content)
    }
}

/// Stores that are in use.
#[derive(Clone, Default)]
pub(super) struct Opened(Arc<Mutex<Vec<Arc<dyn ObjectStore>>>>);

impl Opened {
    /// Remembers a store.
    pub(super) fn add(&self, store: Arc<dyn ObjectStore>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(store);
    }

    /// What all of them have sent and received, where that is billed.
    pub(super) fn traffic(&self) -> Option<Traffic> {
        let stores = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stores.iter().filter_map(|store| store.traffic()).reduce(|a, b| a + b)
    }
}

/// How to reach a bucket.
#[derive(ClapArgs, Clone)]
#[command(next_help_heading = "Options for repositories in a bucket (OBS, S3)")]
pub(super) struct S3 {
    /// Where the bucket is: obs.cn-north-4.myhuaweicloud.com, https://host:port.
    #[arg(long, global = true, env = "EBACKUP_ENDPOINT", value_name = "URL")]
    pub(super) endpoint: Option<String>,
    /// Region of the bucket [default: what the endpoint says, else us-east-1].
    #[arg(long, global = true, env = "EBACKUP_REGION", value_name = "NAME")]
    pub(super) region: Option<String>,
    /// File with the access key: an AWS credentials file, or lines of HUAWEI_CLOUD_ACCESS_KEY_ID=… and
    /// HUAWEI_CLOUD_SECRET_ACCESS_KEY=…. It may change at any time [default: AWS_ACCESS_KEY_ID and
    /// AWS_SECRET_ACCESS_KEY, the HUAWEI_CLOUD_… variables, then ~/.aws/credentials].
    #[arg(long, global = true, env = "EBACKUP_CREDENTIALS_FILE", value_name = "FILE")]
    pub(super) credentials_file: Option<PathBuf>,
    /// Profile in an AWS credentials file.
    #[arg(
        long,
        global = true,
        env = "AWS_PROFILE",
        value_name = "NAME",
        default_value = "default"
    )]
    pub(super) profile: String,
    /// Certificates (PEM) to trust besides the system's.
    #[arg(long, global = true, env = "EBACKUP_CA_FILE", value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// Put the bucket's name into the path instead of the host name. OBS refuses that.
    #[arg(long, global = true, env = "EBACKUP_PATH_STYLE", value_parser = FalseyValueParser::new())]
    pub(super) path_style: bool,
    /// Have the store verify what it receives: costs 1.5 seconds of CPU a GiB [default: only without
    /// TLS, which verifies it already].
    #[arg(long, global = true, value_name = "on|off", value_parser = on_off)]
    pub(super) content_md5: Option<bool>,
    /// Where to keep copies of the index [default: XDG_CACHE_HOME/ebackup or ~/.cache/ebackup]. It may be
    /// deleted at any time.
    #[arg(long, global = true, env = "EBACKUP_CACHE_DIR", value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Most bytes the copies take.
    #[arg(long, global = true, value_name = "SIZE", value_parser = size, default_value = "2G")]
    pub(super) cache_size: u64,
    /// Keep no copies: the index is read from the bucket, piece by piece.
    #[arg(long, global = true)]
    pub(super) no_cache: bool,
    /// Send at most so many bytes a second, all uploads together.
    #[arg(long, global = true, env = "EBACKUP_LIMIT_UPLOAD", value_name = "SIZE", value_parser = size)]
    pub(super) limit_upload: Option<u64>,
    /// Receive at most so many bytes a second, all downloads together.
    #[arg(long, global = true, env = "EBACKUP_LIMIT_DOWNLOAD", value_name = "SIZE", value_parser = size)]
    pub(super) limit_download: Option<u64>,
    /// Address of a host and those below it, as 's3.test:127.0.0.1', instead of asking the system.
    #[arg(long, global = true, env = "EBACKUP_RESOLVE", value_name = "HOST:IP", value_parser = resolve)]
    pub(super) resolve: Vec<(String, std::net::IpAddr)>,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Make a repository.
    ///
    /// Example: ebackup --repo /srv/backup init
    Init(Init),
    /// Save a folder as a snapshot.
    ///
    /// Example: ebackup --repo /srv/backup backup /home/me --exclude '*.tmp' --tag reason=daily
    Backup(Backup),
    /// List snapshots.
    ///
    /// Example: ebackup --repo /srv/backup snapshots --lineage laptop:/home/me
    Snapshots(Snapshots),
    /// Restore a snapshot, or a part of it.
    ///
    /// Example: ebackup --repo /srv/backup restore latest:photos/2024 --target /tmp/photos
    Restore(Restore),
    /// List the content of a snapshot.
    ///
    /// Example: ebackup --repo /srv/backup ls latest photos
    Ls(Ls),
    /// Tell what differs between two snapshots.
    ///
    /// Lines begin with + (only in the second), - (only in the first), M (content differs),
    /// U (owner, mode, times or attributes differ) or ! (there was something, but the second does not have
    /// it: it could not be read, or was excluded).
    ///
    /// Example: ebackup --repo /srv/backup diff 3f2a latest
    Diff(Diff),
    /// Write a file, or a folder as a tar archive, to standard output.
    ///
    /// GNU tar restores everything with 'tar --xattrs --xattrs-include=* --acls -xpf -', bsdtar with
    /// 'bsdtar -xpf -'. Sockets have no place in an archive.
    ///
    /// Example: ebackup --repo /srv/backup dump latest etc/fstab
    Dump(Dump),
    /// Copy snapshots from one repository to another.
    ///
    /// Those that were copied before are passed over.
    ///
    /// Example: ebackup copy --from /srv/backup --to s3://bucket/backup --endpoint obs.cn-north-4.myhuaweicloud.com
    Copy(Copy),
    /// Verify that every snapshot can be restored.
    ///
    /// Example: ebackup --repo /srv/backup check --read-data-subset 5%
    Check(Check),
    /// Remove snapshots by name or by rule; 'prune' then frees their space.
    ///
    /// Example: ebackup --repo /srv/backup forget --keep-daily 7 --keep-weekly 4
    Forget(Forget),
    /// Delete data that no snapshot needs.
    ///
    /// Example: ebackup --repo /srv/backup prune --dry-run
    Prune(Prune),
    /// Tell how large the repository is, and how its parts are used.
    ///
    /// Example: ebackup --repo /srv/backup stats
    Stats,
    /// Add, list or remove keys.
    ///
    /// Example: ebackup --repo /srv/backup key add --new-password-file /root/password
    Key(Key),
    /// Run as the agent on a node of a cluster: save and restore volumes for the controller.
    ///
    /// Where --memory is not given, it takes 75 % of the control group's limit; bandwidth limits count for
    /// each job; --cache-dir is /var/cache/ebackup unless given.
    ///
    /// Example: ebackup agent --node node-1 --pod-uid 0f8fad5b-d9cb-469f-a165-70867728950e
    Agent(Agent),
    /// Wait until all volumes of a pod are restored. For init containers.
    ///
    /// Example: ebackup restore-wait 7c9e6679-7425-40de-944b-e07fc1f90ae7
    RestoreWait(RestoreWait),
    /// Print the completion script of a shell.
    ///
    /// Example: ebackup completions bash > /etc/bash_completion.d/ebackup
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(ClapArgs, Default)]
pub(super) struct Init {
    /// Cut files at fixed offsets, this many bytes apart, instead of by content. For disk images and
    /// databases that change in place.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) fixed_chunks: Option<u64>,
}

#[derive(ClapArgs)]
pub(super) struct Backup {
    /// The folder to save.
    pub(super) path: PathBuf,
    /// Make the repository if there is none.
    #[arg(long)]
    pub(super) init: bool,
    /// Whose previous snapshot to compare with [default: host and path].
    #[arg(long, value_name = "NAME")]
    pub(super) lineage: Option<String>,
    /// Leave out what matches, in the syntax of .gitignore. May be given several times.
    #[arg(long, value_name = "GLOB")]
    pub(super) exclude: Vec<String>,
    /// File with patterns to leave out, one a line.
    #[arg(long, value_name = "FILE")]
    pub(super) exclude_file: Vec<PathBuf>,
    /// Leave out the content of folders marked by a CACHEDIR.TAG.
    #[arg(long)]
    pub(super) exclude_caches: bool,
    /// Do not descend into other file systems.
    #[arg(long)]
    pub(super) one_file_system: bool,
    /// Tag of the snapshot. May be given several times.
    #[arg(long, value_name = "KEY=VALUE", value_parser = tag)]
    pub(super) tag: Vec<(String, String)>,
    /// zstd level from -7 to 22, or 'off'.
    #[arg(long, value_name = "LEVEL", default_value_t, allow_hyphen_values = true)]
    pub(super) compression: Level,
    /// Tell what would be read, and write nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// How to tell a changed file [default: ctime+inode, or mtime where the file system does not keep
    /// them].
    #[arg(long, value_enum, value_name = "HOW")]
    pub(super) changed_by: Option<ChangedByArg>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum ChangedByArg {
    /// Size, modification time, change time and inode number.
    #[value(name = "ctime+inode")]
    CtimeInode,
    /// Size, modification time, owner and mode.
    Mtime,
    /// Read every file.
    Content,
}

impl From<ChangedByArg> for ChangedBy {
    fn from(arg: ChangedByArg) -> Self {
        match arg {
            ChangedByArg::CtimeInode => Self::CtimeInode,
            ChangedByArg::Mtime => Self::Mtime,
            ChangedByArg::Content => Self::Content,
        }
    }
}

#[derive(ClapArgs)]
pub(super) struct Snapshots {
    /// Only those of this lineage.
    #[arg(long, value_name = "NAME")]
    pub(super) lineage: Option<String>,
    /// Only those with this tag. May be given several times.
    #[arg(long, value_name = "KEY=VALUE", value_parser = tag)]
    pub(super) tag: Vec<(String, String)>,
}

#[derive(ClapArgs)]
pub(super) struct Copy {
    /// The repository to copy from: a folder, or s3://bucket/prefix.
    #[arg(long, value_name = "REPO")]
    pub(super) from: String,
    /// The repository to copy to [default: that of --repo].
    #[arg(long, value_name = "REPO")]
    pub(super) to: Option<String>,
    /// Snapshots to copy [default: all].
    #[arg(value_name = "SNAPSHOT")]
    pub(super) snapshots: Vec<String>,
    /// Only those of this lineage.
    #[arg(long, value_name = "NAME")]
    pub(super) lineage: Option<String>,
    /// Make the repository to copy to if there is none.
    #[arg(long)]
    pub(super) init: bool,
    /// Tell what would be copied, and write nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Password file of the repository to copy from. Else EBACKUP_FROM_PASSWORD is used, if set.
    #[arg(long, value_name = "FILE")]
    pub(super) from_password_file: Option<PathBuf>,
    /// Key file of the repository to copy from.
    #[arg(long, value_name = "FILE", conflicts_with = "from_password_file")]
    pub(super) from_key_file: Option<PathBuf>,
    /// Where the bucket to copy from is [default: as --endpoint].
    #[arg(long, value_name = "URL")]
    pub(super) from_endpoint: Option<String>,
    /// Region of the bucket to copy from [default: as --region].
    #[arg(long, value_name = "NAME")]
    pub(super) from_region: Option<String>,
    /// File with the access key of the bucket to copy from [default: as --credentials-file].
    #[arg(long, value_name = "FILE")]
    pub(super) from_credentials_file: Option<PathBuf>,
}

/// Which snapshot.
#[derive(ClapArgs)]
pub(super) struct Which {
    /// With 'latest': the newest of this lineage.
    #[arg(long, value_name = "NAME")]
    pub(super) lineage: Option<String>,
}

#[derive(ClapArgs)]
pub(super) struct Restore {
    /// Id of the snapshot, the beginning of one, or 'latest'; behind a colon, a path within it.
    #[arg(value_name = "SNAPSHOT[:SUBPATH]")]
    pub(super) snapshot: OsString,
    #[command(flatten)]
    pub(super) which: Which,
    /// Folder to restore into: the content of the saved folder lands directly in it.
    #[arg(long, short, value_name = "DIR")]
    pub(super) target: PathBuf,
    /// Restore only what matches, and leave everything else in DIR, and DIR itself, as it is. May be
    /// given several times.
    #[arg(long, value_name = "GLOB")]
    pub(super) include: Vec<String>,
    /// Leave out what matches. May be given several times.
    #[arg(long, value_name = "GLOB")]
    pub(super) exclude: Vec<String>,
    /// What to do with files that exist. A file is replaced when the new one is whole, never before.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "if-changed")]
    pub(super) overwrite: OverwriteArg,
    /// Delete what the snapshot lacks from the folders that are restored: not what the backup did not
    /// look into, nor anything in another file system than DIR.
    #[arg(long)]
    pub(super) delete: bool,
    /// Write large files into the place of existing ones, where there is no room for both. If the
    /// restore fails, the old one is lost.
    #[arg(long)]
    pub(super) in_place: bool,
    /// Read back and compare everything that was written or left as unchanged.
    #[arg(long)]
    pub(super) verify: bool,
    /// Tell what would be restored, and write nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Leave everything to the user who restores. Setuid and setgid bits and capabilities are then
    /// left out.
    #[arg(long)]
    pub(super) no_owner: bool,
    /// Wait at the end until everything is on stable storage.
    #[arg(long)]
    pub(super) sync: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum OverwriteArg {
    /// Replace them.
    Always,
    /// Replace them if size or modification time differ, or if they belong to another user.
    IfChanged,
    /// Leave them.
    Never,
}

impl From<OverwriteArg> for Overwrite {
    fn from(arg: OverwriteArg) -> Self {
        match arg {
            OverwriteArg::Always => Self::Always,
            OverwriteArg::IfChanged => Self::IfChanged,
            OverwriteArg::Never => Self::Never,
        }
    }
}

#[derive(ClapArgs)]
pub(super) struct Ls {
    /// Id of the snapshot, the beginning of one, or 'latest'.
    pub(super) snapshot: String,
    /// Path within it.
    pub(super) subpath: Option<PathBuf>,
    #[command(flatten)]
    pub(super) which: Which,
    /// Also what lies in the folders below.
    #[arg(long, short = 'R')]
    pub(super) recursive: bool,
    /// Also names that were there and were excluded.
    #[arg(long)]
    pub(super) excluded: bool,
}

#[derive(ClapArgs)]
pub(super) struct Diff {
    /// The first snapshot.
    pub(super) first: String,
    /// The second snapshot.
    pub(super) second: String,
    #[command(flatten)]
    pub(super) which: Which,
}

#[derive(ClapArgs)]
pub(super) struct Dump {
    /// Id of the snapshot, the beginning of one, or 'latest'.
    pub(super) snapshot: String,
    /// Path within it.
    pub(super) path: PathBuf,
    #[command(flatten)]
    pub(super) which: Which,
}

#[derive(ClapArgs)]
pub(super) struct Check {
    /// Also decrypt and hash all data.
    #[arg(long, conflicts_with = "read_data_subset")]
    pub(super) read_data: bool,
    /// Also decrypt and hash a random part of the data.
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub(super) read_data_subset: Option<f64>,
    /// Write the index anew from what the packs say they hold.
    #[arg(long, conflicts_with_all = ["read_data", "read_data_subset"])]
    pub(super) repair_index: bool,
}

#[derive(ClapArgs)]
pub(super) struct Forget {
    /// Snapshots to forget: ids, or the beginnings of some.
    #[arg(conflicts_with = "policy")]
    pub(super) snapshots: Vec<String>,
    #[command(flatten)]
    pub(super) policy: Policy,
    /// Only snapshots of this lineage.
    #[arg(long, value_name = "NAME")]
    pub(super) lineage: Option<String>,
    /// Free the space at once.
    #[arg(long, conflicts_with = "dry_run")]
    pub(super) prune: bool,
    /// Tell what would be forgotten, and change nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// Which snapshots of each lineage to keep; the others are forgotten.
#[derive(ClapArgs)]
#[group(id = "policy", multiple = true)]
pub(super) struct Policy {
    /// Keep the newest N.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_last: u32,
    /// Keep the newest of each of the last N hours that have any.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_hourly: u32,
    /// Keep the newest of each of the last N days that have any.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_daily: u32,
    /// Keep the newest of each of the last N weeks that have any.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_weekly: u32,
    /// Keep the newest of each of the last N months that have any.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_monthly: u32,
    /// Keep the newest of each of the last N years that have any.
    #[arg(long, value_name = "N", default_value_t)]
    pub(super) keep_yearly: u32,
    /// Keep all that are at most this much older than the newest (2h, 7d, 1mo, 1y).
    #[arg(long, value_name = "DURATION", value_parser = span)]
    pub(super) keep_within: Option<jiff::Span>,
}

#[derive(ClapArgs)]
pub(super) struct Prune {
    /// How long a backup may give no sign of life before it is declared dead [default: 1h].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(super) grace: Option<std::time::Duration>,
    /// Unused data that may stay in packs that are in use, in percent of all data; what exceeds it is
    /// freed by copying what is used into new packs. 100% copies nothing.
    #[arg(long, value_name = "PERCENT", value_parser = percent, default_value = "5%")]
    pub(super) max_unused: f64,
    /// Copy at most so many bytes.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_repack: Option<u64>,
    /// Print what would be deleted, and change nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl Default for Prune {
    fn default() -> Self {
        Self { grace: None, max_unused: 5.0, max_repack: None, dry_run: false }
    }
}

#[derive(ClapArgs)]
pub(super) struct Agent {
    /// Where the controller is.
    #[arg(
        long,
        env = "EBACKUP_CONTROLLER",
        value_name = "HOST:PORT",
        default_value = "ebackup-controller.velero.svc:7443"
    )]
    pub(super) controller: String,
    /// Name in the controller's certificate [default: the host in --controller].
    #[arg(long, env = "EBACKUP_SERVER_NAME", value_name = "NAME")]
    pub(super) server_name: Option<String>,
    /// Certificates (PEM) of those who may sign the controller's; the system's are not trusted. Read
    /// anew for every connection.
    #[arg(
        long,
        env = "EBACKUP_AUTHORITY_FILE",
        value_name = "FILE",
        default_value = "/etc/ebackup/ca/ca.crt"
    )]
    pub(super) ca_file: PathBuf,
    /// Token of the agent's ServiceAccount, for the audience 'ebackup-controller'. Read anew for every
    /// connection.
    #[arg(
        long,
        env = "EBACKUP_TOKEN_FILE",
        value_name = "FILE",
        default_value = "/var/run/secrets/ebackup/token"
    )]
    pub(super) token_file: PathBuf,
    /// Name of this node.
    #[arg(long, env = "EBACKUP_NODE", value_name = "NAME")]
    pub(super) node: String,
    /// UID of the pod that the agent runs in.
    #[arg(long, env = "EBACKUP_POD_UID", value_name = "UID")]
    pub(super) pod_uid: String,
    /// The kubelet's folder, as mounted into this container.
    #[arg(
        long,
        env = "EBACKUP_KUBELET_ROOT",
        value_name = "DIR",
        default_value = "/var/lib/kubelet"
    )]
    pub(super) kubelet_root: PathBuf,
    /// Jobs at once, at most; no more than the memory allows, 72 MiB each and 24 for the program.
    #[arg(long, env = "EBACKUP_JOBS", value_name = "N", default_value_t = 4)]
    pub(super) jobs: usize,
    /// How far the threads of jobs stand back for others, from 0 to 19.
    #[arg(long, env = "EBACKUP_NICE", value_name = "N", default_value_t = 10)]
    pub(super) nice: i32,
    /// How soon the disk serves them, from 0, the first, to 7, or 'idle' [default: by --nice].
    #[arg(long, env = "EBACKUP_IO_PRIORITY", value_name = "N")]
    pub(super) io_priority: Option<crate::agent::IoPriority>,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, env = "EBACKUP_HTTP", value_name = "IP:PORT", default_value = "0.0.0.0:8085")]
    pub(super) http: std::net::SocketAddr,
    /// Folder for temporary files [default: the system's].
    #[arg(long, env = "EBACKUP_SCRATCH", value_name = "DIR")]
    pub(super) scratch: Option<PathBuf>,
    #[command(flatten)]
    pub(super) log: Log,
}

/// How is logged, to standard error.
#[derive(ClapArgs)]
pub(super) struct Log {
    /// Form of log lines.
    #[arg(
        long,
        env = "EBACKUP_LOG_FORMAT",
        value_enum,
        value_name = "FORM",
        default_value = "text"
    )]
    pub(super) log_format: LogFormat,
    /// What is logged: error, warn, info, debug or trace.
    #[arg(long, env = "EBACKUP_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub(super) log_level: tracing::Level,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

#[derive(ClapArgs)]
pub(super) struct RestoreWait {
    /// UID of the restore.
    #[arg(value_name = "UID")]
    pub(super) restore: String,
    /// The folder with a folder for each volume.
    #[arg(long, value_name = "DIR", default_value = "/restores")]
    pub(super) root: PathBuf,
    #[command(flatten)]
    pub(super) log: Log,
}

#[derive(ClapArgs)]
pub(super) struct Key {
    #[command(subcommand)]
    pub(super) command: KeyCommand,
}

#[derive(Subcommand)]
pub(super) enum KeyCommand {
    /// Add a key: a password from a file, or a new key file.
    ///
    /// Example: ebackup --repo /srv/backup key add --new-password-file /root/password
    Add {
        /// File whose first line is the new password.
        #[arg(long, value_name = "FILE", required_unless_present = "new_key_file")]
        new_password_file: Option<PathBuf>,
        /// Key file to make.
        #[arg(long, value_name = "FILE", conflicts_with = "new_password_file")]
        new_key_file: Option<PathBuf>,
        /// What to call the key.
        #[arg(long, default_value = "")]
        label: String,
    },
    /// List keys.
    ///
    /// Example: ebackup --repo /srv/backup key list
    List,
    /// Remove a key.
    ///
    /// Example: ebackup --repo /srv/backup key remove 0f3a55e1c2d4b697
    Remove {
        /// Its id.
        id: String,
    },
}

/// Parses a command line. What it names goes before what the environment names, also where the two are
/// different options for the same thing.
///
/// # Errors
/// When it is wrong, or asks for help or the version.
pub(super) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let matches = Args::command().try_get_matches_from(words)?;
    let mut args = Args::from_arg_matches(&matches)?;
    let mut innermost = &matches;
    while let Some((_, below)) = innermost.subcommand() {
        innermost = below;
    }
    let typed = |name| innermost.value_source(name) == Some(ValueSource::CommandLine);
    let global = &mut args.global;
    if global.password_file.is_some() && global.key_file.is_some() {
        match (typed("password_file"), typed("key_file")) {
            (true, false) => global.key_file = None,
            (false, true) => global.password_file = None,
            _ => {
                let message = "there is both a password file and a key file: give one of --password-file \
                               (EBACKUP_PASSWORD_FILE) and --key-file (EBACKUP_KEY_FILE)\n";
                return Err(
                    Args::command().error(clap::error::ErrorKind::ArgumentConflict, message)
                );
            }
        }
    }
    Ok(args)
}

/// The completion script for `shell`.
pub(super) fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "ebackup", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Parses a size: a number with an optional suffix K, M, G or T (powers of 1024).
fn size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim_end_matches(['B', 'b']).trim_end_matches('i');
    let (number, shift) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 40),
        _ => (trimmed, 0),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "a size is a number with K, M, G or T behind it".to_owned())
}

fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < crate::backup::MEMORY_BYTES_MIN {
        return Err("the program needs at least 96M".to_owned());
    }
    Ok(bytes)
}

fn tag(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a tag has the form KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("say 'on' or 'off'".to_owned()),
    }
}

fn resolve(text: &str) -> Result<(String, std::net::IpAddr), String> {
    let (host, address) = text.split_once(':').ok_or("give a host and an address: HOST:IP")?;
    let address = address.trim_matches(['[', ']']).parse();
    let address = address.map_err(|_| format!("'{text}' does not end in an IP address"))?;
    Ok((host.to_owned(), address))
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    number
        .ok()
        .filter(|percent| (0.0..=100.0).contains(percent))
        .ok_or_else(|| "a percentage lies between 0% and 100%".to_owned())
}

fn span(text: &str) -> Result<jiff::Span, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    let signed: jiff::SignedDuration = text.parse().map_err(|error| format!("{error}"))?;
    signed.try_into().map_err(|_| "a duration is not negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_with_their_suffixes() {
        let table = [("0", 0), ("7", 7), ("96M", 96 << 20), ("1GiB", 1 << 30), ("2kb", 2048)];
        for (text, bytes) in table {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "M", "-1", "1.5G", "99999999999T", "1X"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_command_has_an_example() {
        fn visit(command: &clap::Command) {
            for command in command.get_subcommands().filter(|command| command.get_name() != "help")
            {
                let help = command.get_long_about().or(command.get_about());
                let has_example = help.is_some_and(|help| help.to_string().contains("Example:"));
                assert!(has_example, "{}", command.get_name());
                if command.get_name() != "key" {
                    visit(command);
                }
            }
        }
        visit(&Args::command());
    }
}
