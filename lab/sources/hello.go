// A small web server with a memory of its own, in an image that holds nothing else: no shell, no libc.
//
//	/              the number of requests so far, counted in memory
//	/client        the address that the client has, as the server sees it
//	/pid           its process id in the container
//	/environment   its environment and arguments, a line each
//	/sleep?ms=N    an answer that takes N milliseconds
//	/fill?mb=N     keep N MiB of memory that no two pages share
//	/spin?ms=N     burn one core for N milliseconds, after the answer
//	/exit?code=N   end
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	requests int64
	kept     [][]byte
)

func number(r *http.Request, name string) int {
	n, _ := strconv.Atoi(r.URL.Query().Get(name))
	return n
}

func main() {
	port := "8080"
	if len(os.Args) > 1 {
		port = os.Args[1]
	}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %d\n", atomic.AddInt64(&requests, 1))
	})
	http.HandleFunc("/client", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) })
	http.HandleFunc("/pid", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, os.Getpid()) })
	http.HandleFunc("/environment", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, strings.Join(append(os.Environ(), os.Args...), "\n"))
	})
	http.HandleFunc("/sleep", func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(time.Duration(number(r, "ms")) * time.Millisecond)
		fmt.Fprintln(w, "slept")
	})
	http.HandleFunc("/fill", func(w http.ResponseWriter, r *http.Request) {
		block := make([]byte, number(r, "mb")<<20)
		for i := 0; i < len(block); i += 4096 {
			copy(block[i:], strconv.Itoa(i))
		}
		kept = append(kept, block)
		fmt.Fprintln(w, "filled")
	})
	http.HandleFunc("/spin", func(w http.ResponseWriter, r *http.Request) {
		end := time.Now().Add(time.Duration(number(r, "ms")) * time.Millisecond)
		go func() {
			for time.Now().Before(end) {
			}
		}()
		fmt.Fprintln(w, "spinning")
	})
	http.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) { os.Exit(number(r, "code")) })

	server := &http.Server{Addr: ":" + port}
	ending := make(chan os.Signal, 1)
	signal.Notify(ending, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		<-ending
		log.Print("SIGTERM: no more requests")
		_ = server.Shutdown(context.Background())
		close(done)
	}()
	log.Printf("listening on %s", server.Addr)
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-done
}
