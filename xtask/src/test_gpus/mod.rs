//! temp
mod verdict;
