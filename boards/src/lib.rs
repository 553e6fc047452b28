//! Board profiles as data, detection, bundles.
