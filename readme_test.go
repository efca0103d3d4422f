//go:build readme

// readme_test.go: the README's shell sessions, run against the program. It needs curl, redis-cli and psql.

package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// varies finds what differs from run to run. (A created_at whose last digits are 0 goes without them, and that
// shows in the length of the new property. redis-cli says "(integer)" in a terminal only.)
var varies = regexp.MustCompile(`(?m)^Date: .*|ttl=\d+|^\d{3,4}$|^Age: \d+|\d{4}-\d\d-\d\dT[\d:.]+Z|^Content-Length: 1\d\d$`)

// What the README shows is what a reader sees.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	reset(t)
	dialRedis(t, services.redisURL).Do("CONFIG", "RESETSTAT")
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "100").serving(t)
	here := strings.NewReplacer("localhost:8000", strings.TrimPrefix(p.url, "http://"))
	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		for _, step := range strings.Split("\n"+block[1], "\n$ ")[1:] {
			command, want, _ := strings.Cut(step, "\n")
			shell := exec.Command("bash", "-c", here.Replace(command))
			shell.Env = append(os.Environ(), "REDIS_URL="+services.redisURL, "DATABASE_URL="+databaseURL(t))
			output, err := shell.Output()
			if err != nil {
				t.Fatalf("%s: %v", command, err)
			}
			got := strings.ReplaceAll(string(output), "\r", "")
			if normal(got) != normal(want) {
				t.Errorf("$ %s\nprints\n%s\nand README.md has\n%s", command, got, want)
			}
			commands++
		}
	}
	if commands < 11 {
		t.Errorf("only %d commands found", commands)
	}
}

// normal is what a command printed, without what varies.
func normal(printed string) string {
	return varies.ReplaceAllString(strings.ReplaceAll(strings.TrimSpace(printed), "(integer) ", ""), "…")
}
