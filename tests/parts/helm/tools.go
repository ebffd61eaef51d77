//go:build tools

// Package helm pins the Helm that tests/parts/install builds from source, because no Debian suite has it. Nothing
// here is compiled into dindpool. The import exists so that `go mod tidy` keeps Helm's modules in go.mod and go.sum.
package helm

import _ "helm.sh/helm/v4/cmd/helm"
