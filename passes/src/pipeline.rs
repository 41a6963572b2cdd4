//! The passes in order.
