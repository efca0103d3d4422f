package main

func benchClient() {}
