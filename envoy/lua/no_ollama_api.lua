-- Under /api/: a server without an Ollama API (llama.cpp) says "not found" in words of its own. Say
-- what is the matter, in Ollama's dialect. Ollama's own 404s are {"error":"..."} and pass untouched.
local SENTENCE = '{"error":"the model server behind this gateway has no Ollama API (/api/): use its OpenAI API under /v1/"}'

function envoy_on_response(h)
  if h:headers():get(":status") ~= "404" then return end
  local body = h:body()
  local text = body and body:getBytes(0, math.min(body:length(), 4096)) or ""
  if text:find('^%s*{%s*"error"%s*:%s*"') then return end
  if body then
    body:setBytes(SENTENCE)
    h:headers():replace("content-type", "application/json")
  end
end
