// What Go's encoding/json makes of texts: once in a struct like those of Ollama, once in one that
// takes any value. Stdin: a length of four bytes and that much text, again and again. Stdout: a line
// for each, [struct or null, any or null].
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
)

type typed struct {
	Model         string         `json:"model"`
	Name          string         `json:"name"`
	Stream        *bool          `json:"stream"`
	Options       map[string]any `json:"options"`
	StreamOptions *struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	MaxTokens           *int `json:"max_tokens"`
	MaxCompletionTokens *int `json:"max_completion_tokens"`
	MaxOutputTokens     *int `json:"max_output_tokens"`
	NPredict            *int `json:"n_predict"`
	N                   *int `json:"n"`
	BestOf              *int `json:"best_of"`
	KeepAlive           any  `json:"keep_alive"`
	Prompt              any  `json:"prompt"`
}

type untyped struct {
	Model               any `json:"model"`
	Name                any `json:"name"`
	Stream              any `json:"stream"`
	Options             any `json:"options"`
	StreamOptions       any `json:"stream_options"`
	MaxTokens           any `json:"max_tokens"`
	MaxCompletionTokens any `json:"max_completion_tokens"`
	MaxOutputTokens     any `json:"max_output_tokens"`
	NPredict            any `json:"n_predict"`
	N                   any `json:"n"`
	BestOf              any `json:"best_of"`
	KeepAlive           any `json:"keep_alive"`
	Prompt              any `json:"prompt"`
}

// As gin does it: one value is read, and what follows is not looked at.
func decode(text []byte, into any) any {
	if json.NewDecoder(bytes.NewReader(text)).Decode(into) != nil {
		return nil
	}
	return into
}

func main() {
	in, out := bufio.NewReaderSize(os.Stdin, 1<<20), bufio.NewWriterSize(os.Stdout, 1<<20)
	write := json.NewEncoder(out)
	write.SetEscapeHTML(false)
	for {
		var size uint32
		if binary.Read(in, binary.BigEndian, &size) != nil {
			out.Flush()
			return
		}
		text := make([]byte, size)
		if _, err := io.ReadFull(in, text); err != nil {
			panic(err)
		}
		if err := write.Encode([]any{decode(text, &typed{}), decode(text, &untyped{})}); err != nil {
			panic(err)
		}
		if in.Buffered() == 0 {
			out.Flush()
		}
	}
}
