//go:build tools

// Package engine29 pins the programs that tests/parts/install builds from
// source, because no Debian suite has them: Docker Engine 29 and the buildx of
// the same age. Nothing here is compiled into dindpool. The imports exist so
// that `go mod tidy` keeps the programs' modules in go.mod and go.sum.
package engine29

import (
	_ "github.com/docker/buildx/cmd/buildx"
	_ "github.com/moby/moby/v2/cmd/docker-proxy"
	_ "github.com/moby/moby/v2/cmd/dockerd"
)
