//! The systemd service and its settings.

/// Where a service's own settings lie, and what it starts.
#[derive(Clone, Debug)]
pub struct Unit<'a> {
    /// For people.
    pub about: &'a str,
    /// Folder of the bundle's files.
    pub folder: &'a str,
    /// The settings file.
    pub settings: &'a str,
}

/// The settings file: what a user changes on the board.
pub fn settings(source: &str, options: &str) -> String {
    format!(
        "# Where frames come from: v4l2:///dev/video0, a folder, synthetic://\n\
         SOURCE={source}\n\
         # More options of vedge-run, blanks between them\n\
         OPTIONS={options}\n"
    )
}

impl Unit<'_> {
    /// Text of the unit. The service runs as a user of its own without rights but to cameras; the files' checksums (and
    /// their signature, where the board has a trusted key) are verified before the model is loaded. It has started when the
    /// model is loaded and the threads run, whether or not a camera is there; a program that hangs is started again.
    ///
    /// Devices besides cameras are those that rpicam-vid opens. Memory that is written and executed stays allowed: programs
    /// that make pictures of raw sensor data may compile at run time.
    pub fn text(&self) -> String {
        let Unit { about, folder, settings } = self;
        format!(
            "[Unit]\n\
             Description=vedge: {about}\n\
             StartLimitIntervalSec=0\n\
             \n\
             [Service]\n\
             Type=notify\n\
             WatchdogSec=30\n\
             TimeoutStartSec=180\n\
             EnvironmentFile={settings}\n\
             ExecStartPre={folder}/vedge-run verify {folder}\n\
             ExecStart={folder}/vedge-run {folder}/model.onnx ${{SOURCE}} --wait $OPTIONS\n\
             Restart=always\n\
             RestartSec=2\n\
             DynamicUser=yes\n\
             SupplementaryGroups=video\n\
             NoNewPrivileges=yes\n\
             ProtectSystem=strict\n\
             ProtectHome=read-only\n\
             PrivateTmp=yes\n\
             DevicePolicy=closed\n\
             DeviceAllow=char-video4linux rw\n\
             DeviceAllow=char-media rw\n\
             DeviceAllow=char-dma_heap rw\n\
             ProtectKernelTunables=yes\n\
             ProtectKernelModules=yes\n\
             ProtectKernelLogs=yes\n\
             ProtectControlGroups=yes\n\
             ProtectClock=yes\n\
             ProtectHostname=yes\n\
             ProtectProc=invisible\n\
             RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n\
             RestrictNamespaces=yes\n\
             RestrictRealtime=yes\n\
             RestrictSUIDSGID=yes\n\
             LockPersonality=yes\n\
             CapabilityBoundingSet=\n\
             SystemCallArchitectures=native\n\
             SystemCallFilter=@system-service\n\
             UMask=0077\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n"
        )
    }
}
