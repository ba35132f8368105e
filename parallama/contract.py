"""
The names that Envoy's files, the Lua filters and the Python services share.

A test reads `envoy/` and holds every namespace and key there to this list.
Ids and sizes are strings: metadata numbers are doubles, and Envoy's `metadata`
descriptor action passes on nothing but strings.
"""

# Written by Lua (envoy/lua/).
LUA = "parallama"

MODEL = "model"  # str: what the upstream is asked for; limits, prices and rows go by it
REQUESTED_MODEL = "requested_model"  # str: the name that the client sent; only where it is mapped
STREAM = "stream"  # bool
MAX_TOKENS = "max_tokens"  # str, decimal: most tokens the client lets the model write, all choices
BODY_BYTES = "body_bytes"  # str, decimal: size of the request's body
STREAM_USAGE = "stream_usage"  # str: "ours" where facts.lua asked for usage, "client" if it did
CHANGED = "changed"  # str: what was made of parameters, as "num_ctx=8192, keep_alive=1800s"

PROMPT_TOKENS = "prompt_tokens"  # number, absent when unknown
COMPLETION_TOKENS = "completion_tokens"  # number, absent when unknown
PROMPT_REPORTED = "prompt_reported"  # str, decimal: the same where it was reported, to learn from
CACHED_TOKENS = "cached_tokens"  # number: part of the prompt that came from a cache
REASONING_TOKENS = "reasoning_tokens"  # number: part of the completion that is no answer yet
TOTAL_TOKENS = "total_tokens"  # number: running total, what settling charges; 0 from the start
USAGE_SOURCE = "usage_source"  # str: "reported", "counted" or "estimated"
FINISHED = "finished"  # bool: the answer's own end marker was seen
COMPUTE_MS = "compute_ms"  # number: time the model itself worked, as the upstream reports it
RESPONSE_MODEL = "response_model"  # str: the model the upstream says it used
FIRST_TOKEN_AT = "first_token_at"  # number: milliseconds since the epoch  # noqa: S105
UPSTREAM_ERROR = "upstream_error"  # bool: an error inside an answer of status 200
NO_END = "no_end"  # bool: a stream that the upstream ended without its end mark
TEXT_COUNTED = "text_counted"  # bool: usage_sink is to count the text, where nothing is reported
USAGE_ODD = "usage_odd"  # bool: the upstream reported counts that cannot be, which were left out

LUA_KEYS = frozenset(
    {
        MODEL, REQUESTED_MODEL, STREAM, MAX_TOKENS, BODY_BYTES, STREAM_USAGE, CHANGED,
        PROMPT_TOKENS, PROMPT_REPORTED, COMPLETION_TOKENS, CACHED_TOKENS, REASONING_TOKENS,
        TOTAL_TOKENS, USAGE_SOURCE, FINISHED, COMPUTE_MS, RESPONSE_MODEL, FIRST_TOKEN_AT,
        UPSTREAM_ERROR, NO_END, TEXT_COUNTED, USAGE_ODD,
    }
)  # fmt: skip

# Written by Lua where authz set `count_text`: what only usage_sink may see, and only from Envoy's
# stream. The trail writes down the namespaces above and below, never this one.
TEXT = "parallama.text"

PROMPT = "prompt"  # str, base64: text of the request; false where it is not needed any more
PROMPT_MORE = "prompt_more"  # number: bytes of it that were too many to pass on
ANSWER_MORE = "answer_more"  # number: the same of the answer, whose text is in "1", "2", ...

TEXT_KEYS = frozenset({PROMPT, PROMPT_MORE, ANSWER_MORE})

# Written by authz.
AUTHZ = "envoy.filters.http.ext_authz"

USER = "user"  # str: users.id
USERNAME = "username"
KEY = "key"  # str: api_keys.id
ROLE = "role"
GATEWAY = "gateway"  # "ollama" or "openai"
DIALECT = "dialect"  # "ollama", "openai" or "anthropic": how refusals are written
ENDPOINT = "endpoint"  # str: the upstream's own path, such as /v1/chat/completions
METERED = "metered"  # str "1" on calls that spend tokens; absent on all others
READ_BODY = "read_body"  # bool true: facts.lua reads the body and refuses what it cannot vouch for
COUNT_TEXT = "count_text"  # bool true: text that nobody reports the tokens of goes to usage_sink
ALIASES = "aliases"  # str: what names mean (parallama/mappings.py); "" once facts.lua has read it
SHAPE = "shape"  # str: what is made of parameters (parallama/shapes.py); "" in the same way
CHECK_MODEL = "check_model"  # bool true: the second ext_authz is asked
MODELS = "models"  # str, with check_model: comma-separated names and prefixes* the key may use
KNOWN_AT = "known_at"  # number: when the database was asked about the credential, since the epoch
RULE = "rule"  # str: what refused the request
WATCH = "watch"  # str: what envoy/wasm/streams.wat asks authz about as long as the answer runs

AUTHZ_KEYS = frozenset(
    {
        USER, USERNAME, KEY, ROLE, GATEWAY, DIALECT, ENDPOINT, METERED, READ_BODY,
        COUNT_TEXT, ALIASES, SHAPE, CHECK_MODEL, MODELS, KNOWN_AT, RULE, WATCH,
    }
)  # fmt: skip

# Written by ratelimit.
RATELIMIT = "envoy.filters.http.ratelimit"

RESERVATION = "reservation"  # str: what stream done settles
GRANTED = "granted"  # number: tokens held for this request
TOKENS_LEFT = "tokens_left"  # number: what the tightest token limit has left after that
REQUESTS_LEFT = "requests_left"  # number: the same for requests
CAP = "cap"  # str, decimal: most tokens that the answer may have, where limits are hard
WOULD_REFUSE = "would_refuse"  # str: shadow limits that had no room
GRANTS = "grants"  # str, absent without any: what they paid for, as "<unit>:<id>,<unit>:<id>"
DECISION = "decision"  # str: members of a JSON object: the limit that decided, and its counters

RATELIMIT_KEYS = frozenset(
    {RESERVATION, GRANTED, TOKENS_LEFT, REQUESTS_LEFT, CAP, WOULD_REFUSE, GRANTS, DECISION}
)

# Descriptor entries of a rate-limit call carry the names above and this one.
REQUEST_ID = "request_id"

# ext_authz context extensions, set by each route in envoy/routes.yaml.
ROUTE_GATEWAY = "gateway"
ROUTE_DIALECT = "dialect"
ROUTE_BASE = "base"  # what the route's prefix adds to the upstream's own path, such as /ollama
