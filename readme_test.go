//go:build readme

// readme_test.go: the shell sessions of the README and of docs/, run against the program. They
// need curl, redis-cli and psql.

package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// sessions are fenced blocks of commands and what they print.
var sessions = regexp.MustCompile("(?s)```console\n(.*?)```")

// varies finds what differs from run to run: times, ages, and the names of snapshots.
var varies = regexp.MustCompile(`(?m)^Date: .*|^Age: \d+|ttl=\d+|took [\d.]+ s|` +
	`\d{4}-\d\d-\d\dT[\d:.]+Z|"server" : "[\d.]+"|"xmax" : \d+|"running" : \[\d[\d, ]*\]`)

// What the pages show is what a reader sees. Each page begins with a fresh program, 100 listings,
// and a Redis of its own.
func TestREADME(t *testing.T) {
	pages := map[string]int{"README.md": 9, "docs/lab.md": 45, "docs/steps.md": 16}
	for page, atLeast := range pages {
		t.Run(page, func(t *testing.T) {
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			reset(t)
			redisURL := startRedis(t).url
			p := runMain(t, []string{"REDIS_URL=" + redisURL},
				"-addr", "127.0.0.1:0", "-seed", "100").serving(t)
			// Where the pages say 8000.
			here := strings.TrimPrefix(p.url, "http://")
			n := 0
			for _, session := range sessions.FindAllStringSubmatch(string(text), -1) {
				for _, step := range strings.Split("\n"+session[1], "\n$ ")[1:] {
					runStep(t, strings.ReplaceAll(step, "localhost:8000", here), redisURL)
					n++
				}
			}
			if n < atLeast {
				t.Errorf("only %d commands found, want %d or more", n, atLeast)
			}
		})
	}
}

// runStep runs a command, and compares what it prints. A command goes on in lines that begin with
// "> ".
func runStep(t *testing.T, step, redisURL string) {
	t.Helper()
	command, want, _ := strings.Cut(step, "\n")
	for strings.HasPrefix(want, "> ") {
		line, rest, _ := strings.Cut(want[2:], "\n")
		command, want = command+"\n"+line, rest
	}
	shell := exec.Command("bash", "-c", command)
	shell.Env = append(os.Environ(), "REDIS_URL="+redisURL, "DATABASE_URL="+databaseURL(t))
	output, err := shell.Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if got := string(output); normal(got) != normal(want) {
		t.Errorf("$ %s\nprints\n%s\nand the page has\n%s", command, got, want)
	}
}

// normal is what a command printed, without what varies. (redis-cli says "(integer)" in a terminal
// only.)
func normal(printed string) string {
	printed = strings.NewReplacer("\r", "", "(integer) ", "").Replace(strings.TrimSpace(printed))
	return varies.ReplaceAllString(printed, "…")
}
