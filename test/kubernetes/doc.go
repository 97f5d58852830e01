// Package kubernetes has a test that runs deploy/kubernetes in a real cluster of one node: etcd, the API server, the controllers,
// the scheduler, kubelet, containerd and kube-proxy, in namespaces of their own. `make test-kubernetes` builds what it needs.
//
// The go.mod names Kubernetes and etcd as tools, so that `go build tool` makes their binaries.
package kubernetes
