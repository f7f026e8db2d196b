//! cube.cuh
