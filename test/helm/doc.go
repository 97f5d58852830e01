// Package helm has the tests of deploy/helm, and of docs/install.md's kustomization. It is a module of its own, so that what Helm and
// kustomize need is not the plugin's.
package helm
