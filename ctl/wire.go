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

// Service is a service as it stands: the first 8 digits of the commit that runs, the state's name,
// why it is in that state, and since when (time.RFC1123, in UTC).
type Service struct {
	Service   string `json:"service"`
	Hash      string `json:"hash"`
	State     string `json:"state"`
	StateInfo string `json:"stateinfo"`
	Change    string `json:"change"`
}
