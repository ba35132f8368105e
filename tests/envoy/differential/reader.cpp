// What nlohmann::json makes of texts, called as llama.cpp calls it. The frames are those of reader.go.
#include <cstdint>
#include <cstdio>
#include <string>

#include <nlohmann/json.hpp>

using json = nlohmann::ordered_json;

static const char * FIELDS[] = {
    "model", "name", "stream", "options", "stream_options", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "n_predict", "n", "best_of", "keep_alive", "prompt",
};

int main() {
    unsigned char head[4];
    while (std::fread(head, 1, 4, stdin) == 4) {
        std::string text((std::size_t) head[0] << 24 | head[1] << 16 | head[2] << 8 | head[3], '\0');
        if (std::fread(text.data(), 1, text.size(), stdin) != text.size()) return 1;
        json seen = nullptr;
        try {
            const json body = json::parse(text);
            if (body.is_object()) {
                seen = json::object();
                for (const char * name : FIELDS) seen[name] = body.contains(name) ? body.at(name) : json();
            }
        } catch (const json::exception &) {
        }
        const std::string line = json::array({seen}).dump() + "\n";
        std::fwrite(line.data(), 1, line.size(), stdout);
    }
    return 0;
}
