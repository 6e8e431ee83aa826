module gitopper

go 1.26.5

require (
	github.com/BurntSushi/toml v1.6.0
	golang.org/x/crypto v0.58.0
)

require golang.org/x/sys v0.49.0 // indirect
