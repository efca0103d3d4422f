//go:build readme

// readme_test.go: the README's shell sessions, run against the program. It needs curl and redis-cli.

package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// varies finds what differs from run to run. (A created_at whose last digits are 0 goes without them, and that
// shows in the length of the new property.)
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
	here := strings.NewReplacer("localhost:8000", strings.TrimPrefix(p.url, "http://"), "redis-cli", "redis-cli -u "+services.redisURL)
	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		for _, step := range strings.Split("\n"+block[1], "\n$ ")[1:] {
			command, want, _ := strings.Cut(step, "\n")
			output, err := exec.Command("bash", "-c", here.Replace(command)).Output()
			if err != nil {
				t.Fatalf("%s: %v", command, err)
			}
			got := strings.ReplaceAll(string(output), "\r", "")
			if varies.ReplaceAllString(strings.TrimSpace(got), "…") != varies.ReplaceAllString(strings.TrimSpace(want), "…") {
				t.Errorf("$ %s\nprints\n%s\nand README.md has\n%s", command, got, want)
			}
			commands++
		}
	}
	if commands < 9 {
		t.Errorf("only %d commands found", commands)
	}
}
