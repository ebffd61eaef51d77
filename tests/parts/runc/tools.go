//go:build tools

// Package runc pins the runc that tests/parts/install builds for Engine 29; see
// there for why. It is a module of its own, so that runc is built with the
// dependencies that its own release was tested with.
package runc

import _ "github.com/opencontainers/runc"
