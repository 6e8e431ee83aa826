package ctl

// Machines is the answer to /list/machine: every entry of the config.
type Machines struct {
	Machines []Machine `json:"machines"`
}

// Machine is an entry's machine, and the hostname of the host that answers.
type Machine struct {
	Machine string `json:"machine"`
	Actual  string `json:"actual"`
}

// Services is the answer to /list/service, and with a single entry the one to every /do/ command.
type Services struct {
	Services []Service `json:"services"`
}

// Service is a service as it stands: the first 8 digits of the commit that runs, the state's name, why it is
// in that state, since when, how many commits upstream would change it, and when what runs was committed.
// Times are time.RFC1123 in UTC, empty where they are not known.
type Service struct {
	Service   string `json:"service"`
	Hash      string `json:"hash"`
	State     string `json:"state"`
	StateInfo string `json:"stateinfo"`
	Change    string `json:"change"`
	Pending   int    `json:"pending"`
	Committed string `json:"committed"`
}

// Log is the answer to /list/log: what ran here, 50 at most, and which commits upstream would change the
// service; the newest first. More is how many of those are left out.
type Log struct {
	Service string   `json:"service"`
	Ran     []Ran    `json:"ran"`
	Pending []Commit `json:"pending"`
	More    int      `json:"more"`
}

// Ran is a commit that went live: its whole hash, when (time.RFC1123, UTC), by whom or what, and what came of
// it; empty where that is not known, or not yet.
type Ran struct {
	Hash    string `json:"hash"`
	When    string `json:"when"`
	By      string `json:"by"`
	Outcome string `json:"outcome"`
}

// Commit is a commit as its author described it, on one line each, without control characters: its whole hash
// and when it was committed (time.RFC1123, UTC).
type Commit struct {
	Hash    string `json:"hash"`
	Date    string `json:"date"`
	Author  string `json:"author"`
	Subject string `json:"subject"`
}
