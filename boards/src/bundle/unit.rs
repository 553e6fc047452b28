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
    /// their signature, where the board has a trusted key) are verified before the model is loaded.
    pub fn text(&self) -> String {
        let Unit { about, folder, settings } = self;
        format!(
            "[Unit]\n\
             Description=vedge: {about}\n\
             StartLimitIntervalSec=0\n\
             \n\
             [Service]\n\
             EnvironmentFile={settings}\n\
             ExecStartPre={folder}/vedge-run verify {folder}\n\
             ExecStart={folder}/vedge-run {folder}/model.onnx ${{SOURCE}} $OPTIONS\n\
             Restart=always\n\
             RestartSec=2\n\
             DynamicUser=yes\n\
             SupplementaryGroups=video\n\
             NoNewPrivileges=yes\n\
             ProtectSystem=strict\n\
             ProtectHome=read-only\n\
             PrivateTmp=yes\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n"
        )
    }
}
