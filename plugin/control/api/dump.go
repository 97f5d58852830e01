package api

// The media types of a dump.
const (
	SnapshotForm = "application/zstd" // a snapshot, as in the file of cache_file_path
	ZoneForm     = "text/dns"         // lines of a zone file (RFC 4027), with comments that say what the records are
)

// MaxLoad is the most bytes of a dump that is loaded. A million answers are about 100 MB.
const MaxLoad = 1 << 30

// LoadReply answers POST /v1/load.
type LoadReply struct {
	Loaded  int            `json:"loaded"`  // answers that are held now
	Refused map[string]int `json:"refused"` // answers that are not, by reason: malformed, zone, future, expired, subnet, room
}
