;; Cuts answers that run when their credential is revoked: docs/decisions/0022.
;;
;; Each of Envoy's workers has its own instance. It remembers the streams of its worker, and every
;; 0.4 seconds it asks authz which of them are to be cut, if there are any. Bytes of requests and
;; answers do not pass through here.
;;
;; `make wasm` turns this into streams.wasm. The words of both sides are in authz/streams.py.
(module
  ;; What Envoy offers: the Proxy-Wasm ABI 0.2.1. Each returns 0 where all is well.
  (import "env" "proxy_set_tick_period_milliseconds" (func $tick_every (param i32) (result i32)))
  (import "env" "proxy_get_property" ;; path, size; where to put: address, size
    (func $get_property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_grpc_call" ;; cluster, service, method, headers, message: address, size each; ms; where to put a token
    (func $grpc_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" ;; which, from, size; where to put: address, size
    (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_effective_context" (func $set_stream (param i32) (result i32)))
  (import "env" "proxy_send_local_response" ;; status; reason, body, headers: address, size each; gRPC status
    (func $answer (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))

  ;; Memory: what Envoy hands over (an address, a size), our texts, and from 512 on a slot for each
  ;; stream that runs. What Envoy hands over itself lies behind the slots, until the next call.
  (memory (export "memory") 1)
  (data (i32.const 16) "metadata\00filter_metadata\00envoy.filters.http.ext_authz\00watch")
  (data (i32.const 80) "authz")
  (data (i32.const 96) "parallama.Streams")
  (data (i32.const 128) "Judge")
  (data (i32.const 144) "credential_revoked")
  (data (i32.const 176) ;; one header: the sizes of its name and value, then both
    "\01\00\00\00\0c\00\00\00\10\00\00\00content-type\00application/json\00")

  ;; A slot has 128 bytes: the stream's number, the size of what authz said of it, and that.
  (global $streams (mut i32) (i32.const 0)) ;; how many
  (global $next (mut i32) (i32.const 0)) ;; the first that the next question is about
  (global $asked (mut i32) (i32.const 0)) ;; is an answer to come?

  (func $slot (param $n i32) (result i32)
    (i32.add (i32.const 512) (i32.shl (local.get $n) (i32.const 7))))

  ;; The slot of a stream, or 0.
  (func $find (param $stream i32) (result i32)
    (local $at i32) (local $end i32)
    (local.set $at (call $slot (i32.const 0)))
    (local.set $end (call $slot (global.get $streams)))
    (loop $on
      (if (i32.ge_u (local.get $at) (local.get $end)) (then (return (i32.const 0))))
      (if (i32.eq (i32.load (local.get $at)) (local.get $stream)) (then (return (local.get $at))))
      (local.set $at (i32.add (local.get $at) (i32.const 128)))
      (br $on))
    (unreachable))

  (func (export "proxy_abi_version_0_2_1"))

  ;; Room for what Envoy hands over, with a free slot before it.
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $at i32) (local $pages i32)
    (local.set $at (call $slot (i32.add (global.get $streams) (i32.const 1))))
    (local.set $pages (i32.sub
      (i32.shr_u
        (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 65535)) (i32.const 16))
      (memory.size)))
    (if (i32.gt_s (local.get $pages) (i32.const 0))
      (then (drop (memory.grow (local.get $pages)))))
    (local.get $at))

  (func (export "proxy_on_configure") (param $root i32) (param $size i32) (result i32)
    (i32.eqz (call $tick_every (i32.const 400))))

  ;; A stream begins. Those that authz does not want to watch carry no word of it.
  (func (export "proxy_on_request_headers")
    (param $stream i32) (param $headers i32) (param $ends i32) (result i32)
    (local $at i32) (local $size i32)
    (if (call $get_property (i32.const 16) (i32.const 59) (i32.const 0) (i32.const 4))
      (then (return (i32.const 0))))
    (local.set $size (i32.load (i32.const 4)))
    (if (i32.or (i32.eqz (local.get $size)) (i32.gt_u (local.get $size) (i32.const 120)))
      (then (return (i32.const 0))))
    (local.set $at (call $slot (global.get $streams)))
    (i32.store (local.get $at) (local.get $stream))
    (i32.store offset=4 (local.get $at) (local.get $size))
    (memory.copy
      (i32.add (local.get $at) (i32.const 8)) (i32.load (i32.const 0)) (local.get $size))
    (global.set $streams (i32.add (global.get $streams) (i32.const 1)))
    (i32.const 0))

  ;; A stream is over, however it ended. The last slot moves to its place.
  (func (export "proxy_on_delete") (param $stream i32)
    (local $at i32)
    (local.set $at (call $find (local.get $stream)))
    (if (local.get $at)
      (then
        (global.set $streams (i32.sub (global.get $streams) (i32.const 1)))
        (memory.copy (local.get $at) (call $slot (global.get $streams)) (i32.const 128)))))

  ;; Ask about all, or where they are very many about the next 4096: a message has its limit.
  (func (export "proxy_on_tick") (param $root i32)
    (local $from i32) (local $count i32)
    (if (i32.or (global.get $asked) (i32.eqz (global.get $streams))) (then (return)))
    (local.set $from (global.get $next))
    (if (i32.ge_u (local.get $from) (global.get $streams)) (then (local.set $from (i32.const 0))))
    (local.set $count (i32.sub (global.get $streams) (local.get $from)))
    (if (i32.gt_u (local.get $count) (i32.const 4096))
      (then (local.set $count (i32.const 4096))))
    (global.set $next (i32.add (local.get $from) (local.get $count)))
    (global.set $asked (i32.eqz (call $grpc_call
      (i32.const 80) (i32.const 5) (i32.const 96) (i32.const 17) (i32.const 128) (i32.const 5)
      (i32.const 0) (i32.const 0)
      (call $slot (local.get $from)) (i32.shl (local.get $count) (i32.const 7))
      (i32.const 1000) (i32.const 8)))))

  ;; No answer: authz is away. The next question comes with the next tick.
  (func (export "proxy_on_grpc_close") (param $root i32) (param $token i32) (param $status i32)
    (global.set $asked (i32.const 0)))

  ;; For each stream to be cut: its number, the status and the size of a body, and the body. Envoy
  ;; sends them where nothing was sent yet, and breaks off where the answer runs.
  (func (export "proxy_on_grpc_receive") (param $root i32) (param $token i32) (param $size i32)
    (local $at i32) (local $end i32) (local $length i32)
    (global.set $asked (i32.const 0))
    (if (i32.eqz (local.get $size)) (then (return)))
    (if (call $get_buffer
        (i32.const 5) (i32.const 0) (local.get $size) (i32.const 0) (i32.const 4))
      (then (return)))
    (local.set $at (i32.load (i32.const 0)))
    (local.set $end (i32.add (local.get $at) (i32.load (i32.const 4))))
    (loop $on
      (if (i32.ge_u (local.get $at) (local.get $end)) (then (return)))
      (local.set $length (i32.load offset=8 (local.get $at)))
      (if (call $find (i32.load (local.get $at))) ;; or it has ended meanwhile
        (then
          (drop (call $set_stream (i32.load (local.get $at))))
          (drop (call $answer
            (i32.load offset=4 (local.get $at))
            (i32.const 144) (i32.const 18)
            (i32.add (local.get $at) (i32.const 12)) (local.get $length)
            (i32.const 176) (i32.const 42)
            (i32.const -1)))))
      (local.set $at (i32.add (i32.add (local.get $at) (i32.const 12)) (local.get $length)))
      (br $on)))
)
