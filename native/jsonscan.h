/* Incremental scan of a JSON text (RFC 8259) for the few members a gateway decides on.
 *
 * Two scanners on one tokenizer: json_request over a caller's body, which must hold exactly one well-formed object and
 * whose answers are trusted for policy and routing; and json_answer over what a model server sends, which only counts.
 * Both may be fed split anywhere, allocate at most what is said below, and never recurse.
 */
#ifndef ASC_JSONSCAN_H
#define ASC_JSONSCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t max_depth;  /* 64: nesting of objects and arrays */
    uint32_t max_keys;   /* 10,000: members of all objects together */
    uint32_t max_digits; /* 64: bytes of one number */
} json_limits;

enum json_error {
    JSON_OK = 0,
    JSON_SYNTAX,       /* not JSON: grammar, control byte in a string, lone surrogate escape, invalid UTF-8 */
    JSON_NOT_OBJECT,   /* JSON, but not an object */
    JSON_TRUNCATED,    /* ended inside the object (only from json_request_end) */
    JSON_TRAILING,     /* bytes other than white space after the object */
    JSON_DUPLICATE,    /* a top-level member twice (compared after unescaping), or a nested one that is read here */
    JSON_DEPTH,
    JSON_KEYS,
    JSON_NUMBER,       /* a number over max_digits */
    JSON_FIELD,        /* a member of interest has the wrong type (model not a string, stream not a boolean, ...) */
    JSON_MEMORY,
};

#define JSON_MODEL_MAX 256

/* What the scan of a request tells. Offsets count from the first byte fed. A member that is absent has len 0 / -1. */
typedef struct {
    char model[JSON_MODEL_MAX]; /* unescaped value of "model"; JSON_FIELD if it is longer than this */
    uint16_t model_len;
    bool has_model;
    uint64_t model_off, model_raw_len;   /* the raw value, quotes included: where an alias is spliced */
    int8_t stream;                       /* -1 absent (null counts as absent), 0, 1 */
    int64_t max_tokens;                  /* max_completion_tokens, else max_tokens, max_output_tokens, else
                                            parameters.max_new_tokens; -1 absent */
    int64_t n;                           /* "n", -1 absent */
    uint64_t options_off, options_raw_len; /* raw value of "stream_options" (an object or null), len 0 if absent */
    int8_t include_usage;                /* stream_options.include_usage: -1 absent, 0, 1 */
    uint64_t include_off, include_raw_len; /* its raw value, len 0 if absent */
    int8_t continuous_usage;             /* stream_options.continuous_usage_stats: -1 absent, 0, 1 */
    uint64_t open_off;                   /* offset just after the top-level '{' : where a member may be inserted */
    bool empty;                          /* the object has no member (an inserted one takes no comma) */
} json_fields;

typedef struct json_request json_request; /* opaque; one is reused for many bodies */

json_request *json_request_new(void);     /* NULL: no memory */
void json_request_free(json_request *scan);
/* Begin a new body. Keeps the memory of the last one up to 64 KiB. `seed` randomises the table of member names. */
void json_request_start(json_request *scan, const json_limits *limits, uint64_t seed);
/* Feed some bytes; after an error every further call returns the same error. */
enum json_error json_request_feed(json_request *scan, const char *bytes, size_t len);
/* The body is complete. Fields are meaningful only when this returns JSON_OK. */
enum json_error json_request_end(json_request *scan);
const json_fields *json_request_fields(const json_request *scan);
uint64_t json_request_offset(const json_request *scan); /* bytes fed: where an error was met, roughly */
const char *json_error_sentence(enum json_error error); /* static, lower case, for humans */

/* ---- what a model server answered: lenient about values, strict about nesting; never an error to the caller ------- */

enum json_dialect {
    JSON_NONE,      /* count nothing */
    JSON_OPENAI,    /* chat, completions, embeddings, rerank: usage{prompt_tokens,completion_tokens}, choices[].finish_reason */
    JSON_MESSAGES,  /* Anthropic: usage{input_tokens,output_tokens} at the top or in "message"; stop_reason at the top, in
                       "delta" or "message"; type */
    JSON_RESPONSES, /* usage{input_tokens,output_tokens} at the top or in "response"; status; type */
    JSON_TGI,       /* generated_text not null; details{finish_reason,generated_tokens,input_length}; error, error_type */
};

enum json_finish { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_TOOL, FINISH_FILTER, FINISH_ABORT, FINISH_ERROR, FINISH_OTHER };

typedef struct {
    int64_t usage_in, usage_out;    /* last values seen, -1 none; an explicit 0 stays 0; `usage: null` is none */
    uint8_t finish;                 /* enum json_finish, the last not null */
    bool has_error;                 /* a top-level "error" member that is not null, or "type":"error" */
    bool has_content;               /* choices/delta/output carries a content byte: see sse.h */
    bool final_text;                /* TGI: generated_text is a string */
    bool choices_empty;             /* OPENAI: "choices":[] */
    int32_t index;                  /* OPENAI: choices[].index, the last; -1 none */
    char type[40];                  /* MESSAGES, RESPONSES: value of top-level "type", truncated */
    uint8_t type_len;
    /* OPENAI: where the top-level member ,"usage":{...} (or null) lies in the bytes fed since start, from the comma before
       it (or after it when it is first) to the end of its value; len 0 when absent. */
    uint64_t usage_off, usage_raw_len;
} json_facts;

typedef struct {
    /* private; about 300 bytes, no allocation, may be copied */
    uint64_t opaque[48];
} json_answer;

void json_answer_start(json_answer *scan, enum json_dialect dialect);
/* Returns false once the text is not JSON (facts up to there stay); never reads past len. */
bool json_answer_feed(json_answer *scan, const char *bytes, size_t len);
const json_facts *json_answer_facts(const json_answer *scan);

#endif
