//! Picture folders, observers and statistics with bounded memory.
