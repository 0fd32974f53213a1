/* test_proto.c - messages and frames: what comes in is hostile until decoded. */
#include <math.h>
#include <stdlib.h>

#include "proto/schema.h"
#include "tests/proto_rig.h"

/* Every record is tested from one list. */
#define ID_OF_RECORD(record) RECORD_##record,
#define ID_OF_MESSAGE(NAME, record, number) RECORD_##record,

/* In [0, max], often at an end or of a short width, where encodings change form. */
static uint64_t random_up_to(uint64_t max) {
    uint64_t r = random_u64() >> (random_u64() % 64);
    if (random_u64() % 8 == 0) return max;
    if (random_u64() % 8 == 0) return 0;
    return max == UINT64_MAX ? r : r % (max + 1);
}

/* ---- allocations, counted: what a decoder takes must be bounded by what it was given ---------- */

static size_t calloc_bytes;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CALLOC_COUNTED 0 /* the sanitizer owns calloc */
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CALLOC_COUNTED 0
#endif
#endif
#ifndef CALLOC_COUNTED
#define CALLOC_COUNTED 1
void *__libc_calloc(size_t count, size_t size);
void *calloc(size_t count, size_t size) {
    calloc_bytes += count * size;
    return __libc_calloc(count, size);
}
#endif

/* ---- random records, generated from the field lists themselves -------------------------------- */

#define ITEMS_MAX 5u

static void random_bytes_field(struct proto_bytes *b, uint64_t max) {
    b->length = (uint32_t)random_up_to(max < 600 ? max : 600);
    b->data = junk + random_u64() % (sizeof junk - 600);
}
static void random_text_field(struct proto_bytes *b, uint64_t max) {
    static const char text[] =
        "h\xc3\xa9llo, \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x90\xab wide enough for "
        "every short form there is and some longer ones than those";
    b->data = (const uint8_t *)text;
    b->length = (uint32_t)random_up_to(max < sizeof text - 1 ? max : sizeof text - 1);
    while (b->length && (b->data[b->length] & 0xc0) == 0x80) b->length--;
}
static double random_double(void) {
    return ldexp((double)(int64_t)random_u64(), (int)(random_u64() % 60) - 90);
}

#define RANDOM_U8(p, max) (*(p) = (uint8_t)random_up_to((max) != 0 ? (max) : UINT8_MAX))
#define RANDOM_U32(p, max) (*(p) = (uint32_t)random_up_to((max) != 0 ? (max) : UINT32_MAX))
#define RANDOM_U64(p, max) (*(p) = random_up_to((max) != 0 ? (max) : UINT64_MAX))
#define RANDOM_I32(p, max) (*(p) = (int32_t)random_u64() >> (random_u64() % 32))
#define RANDOM_F32(p, max) (*(p) = (float)random_double())
#define RANDOM_F64(p, max) (*(p) = random_double())
#define RANDOM_DIGEST(p, max) memcpy((p)->b, junk + random_u64() % 1000, 32)
#define RANDOM_KEY(p, max) memcpy((p)->b, junk + random_u64() % 1000, 32)
#define RANDOM_SIG(p, max) memcpy((p)->b, junk + random_u64() % 1000, 64)
#define RANDOM_BYTES(p, max) random_bytes_field(p, max)
#define RANDOM_STR(p, max) random_text_field(p, max)
#define RANDOM_FIELD(kind, name, max) RANDOM_##kind(&m->name, max);
#define RANDOM_LIST(record, name, max)                                                             \
    m->name##_count = (uint32_t)random_up_to((max) < ITEMS_MAX ? (max) : ITEMS_MAX);               \
    m->name = m->name##_count ? calloc(m->name##_count, sizeof *m->name) : NULL;                   \
    for (uint32_t i = 0; i < m->name##_count; i++) make_random_##record(&m->name[i]);
#define RANDOM_RECORD(record)                                                                      \
    static void make_random_##record(struct msg_##record *m) {                                     \
        memset(m, 0, sizeof *m);                                                                   \
        FIELDS_##record(RANDOM_FIELD, RANDOM_LIST)                                                 \
    }
#define RANDOM_MESSAGE(NAME, record, number) RANDOM_RECORD(record)
PROTO_RECORDS(RANDOM_RECORD)
PROTO_MESSAGES(RANDOM_MESSAGE)

#define CASE_RANDOM(record)                                                                        \
    case RECORD_##record:                                                                          \
        make_random_##record(m);                                                                   \
        break;
#define CASE_RANDOM_MESSAGE(NAME, record, number) CASE_RANDOM(record)
static void random_of(enum proto_record which, void *m) {
    switch (which) {
        PROTO_RECORDS(CASE_RANDOM)
        PROTO_MESSAGES(CASE_RANDOM_MESSAGE)
    default: fail();
    }
}

union any_record {
    uint8_t bytes[1024];
    uint64_t align;
};

static struct proto_buffer encoded(enum proto_record which, const void *m) {
    struct proto_buffer b;
    struct err err = {0};
    proto_buffer_init(&b, PROTO_FRAME_BYTES_MAX);
    if (proto_encode(&b, which, m, &err)) fail_msg("%s", err.msg);
    return b;
}

/* ---- encoding --------------------------------------------------------------------------------- */

/* Bytes on the wire are a contract with nodes in other languages: they may not change by accident.
 */
static void golden_bytes(void **state) {
    (void)state;
    struct proto_buffer b = encoded(RECORD_enrolled, &(struct msg_enrolled){.member = 300});
    assert_hex(b.data, b.length, "91cd012c");
    proto_buffer_release(&b);

    struct msg_heartbeat hb = {.progress = 127,
                               .step = 128,
                               .loss = 1.5,
                               .tokens_per_s = -2,
                               .phase = 255,
                               .trainer_restarts = 65536,
                               .state_index = UINT64_C(1) << 32};
    b = encoded(RECORD_heartbeat, &hb);
    assert_hex(b.data, b.length,
               "987fcc80cb3ff8000000000000cbc000000000000000ccffce00010000cf000000010000000090");
    proto_buffer_release(&b);

    struct msg_lease leases[2] = {{1, 2, 3, 4}, {500, 0, 70000, 255}};
    b = encoded(RECORD_leases, &(struct msg_leases){leases, 2});
    assert_hex(b.data, b.length,
               "91929401020304"
               "94cd01f400ce00011170ccff");
    proto_buffer_release(&b);

    struct msg_bye bye = {.code = 6, .final = 1, .reason = proto_str("h\xc3\xa9")};
    b = encoded(RECORD_bye, &bye);
    assert_hex(b.data, b.length, "930601a368c3a9");
    proto_buffer_release(&b);

    struct msg_want want = {.round = 1, .chunks = {(const uint8_t *)"\xff\x01", 2}};
    b = encoded(RECORD_want, &want);
    assert_hex(b.data, b.length, "930001c402ff01");
    proto_buffer_release(&b);

    static const int32_t grids[] = {0, 127, 128, -1, -32, -33, -128, -129, -32768, -32769, 70000};
    static const char *const forms[] = {"00",     "7f",         "cc80",      "ff",
                                        "e0",     "d0df",       "d080",      "d1ff7f",
                                        "d18000", "d2ffff7fff", "ce00011170"};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++) {
        struct msg_plan plan = {.grid_exponent = grids[i]};
        char hex[64];
        snprintf(hex, sizeof hex, "9900000000%s00909090", forms[i]);
        b = encoded(RECORD_plan, &plan);
        assert_hex(b.data, b.length, hex);
        struct msg_plan back;
        struct err err;
        assert_int_equal(proto_decode(b.data, b.length, RECORD_plan, &back, &err), 0);
        assert_int_equal(back.grid_exponent, grids[i]);
        proto_decoded_release(RECORD_plan, &back);
        proto_buffer_release(&b);
    }
}

/* Every record, with contents nobody would think of, comes back as it went, also through a deep
 * copy; and its encoding is never longer than proto_record_bytes_max() says. */
static void every_record_goes_round(void **state) {
    (void)state;
    for (enum proto_record which = 0; which < RECORD_COUNT; which++) {
        for (int turn = 0; turn < 40; turn++) {
            union any_record in, out, copy;
            struct err err = {0};
            assert_true(proto_record_size(which) <= sizeof in);
            random_of(which, &in);
            struct proto_buffer b = encoded(which, &in), c, d;
            assert_true(b.length <= proto_record_bytes_max(which));
            if (proto_decode(b.data, b.length, which, &out, &err)) fail_msg("%s", err.msg);
            c = encoded(which, &out);
            assert_int_equal(b.length, c.length);
            assert_memory_equal(b.data, c.data, b.length);
            assert_int_equal(proto_copy(which, &out, &copy, &err), 0);
            proto_decoded_release(which, &out);
            memset(c.data, 0xee, c.length);
            proto_buffer_release(&c);
            d = encoded(which, &copy); /* the copy needs neither the record nor the payload */
            assert_int_equal(b.length, d.length);
            assert_memory_equal(b.data, d.data, b.length);
            proto_copy_release(which, &copy);
            proto_decoded_release(which, &in);
            proto_buffer_release(&b);
            proto_buffer_release(&d);
        }
    }
}

/* A payload that stops anywhere is refused with a sentence, and nothing leaks (asan). */
static void every_truncation_is_refused(void **state) {
    (void)state;
    for (enum proto_record which = 0; which < RECORD_COUNT; which++) {
        union any_record in, out;
        random_of(which, &in);
        struct proto_buffer b = encoded(which, &in);
        for (size_t n = 0; n < b.length; n++) {
            uint8_t *exact = malloc(n ? n : 1); /* so that asan sees a read past the end */
            memcpy(exact, b.data, n);
            assert_refused(proto_decode(exact, n, which, &out, err), ERR_PROTOCOL,
                           proto_record_name(which));
            free(exact);
        }
        proto_buffer_append(&b, "\0", 1);
        assert_refused(proto_decode(b.data, b.length, which, &out, err), ERR_PROTOCOL,
                       "bytes follow its end");
        proto_decoded_release(which, &in);
        proto_buffer_release(&b);
    }
}

static void mutate(uint8_t *bytes, size_t length) {
    static const uint8_t nasty[] = {0xdd, 0xdc, 0xdf, 0xde, 0xc6, 0xdb, 0xc9, 0xc1, 0xcf,
                                    0xd3, 0xff, 0x9f, 0xca, 0xcb, 0xc0, 0x00, 0x7f, 0x80};
    for (uint64_t n = 1 + random_u64() % 3; n; n--) {
        uint8_t *at = bytes + random_u64() % (length < 64 || random_u64() % 2 ? length : 64);
        if (random_u64() % 2)
            *at = nasty[random_u64() % sizeof nasty];
        else
            *at ^= (uint8_t)(1u << random_u64() % 8);
    }
}

/* Random damage: no crash, no memory beyond a small multiple of the payload, and what is accepted
 * is canonical: it encodes to the very bytes that came. */
static void damaged_payloads_are_harmless(void **state) {
    (void)state;
    unsigned accepted = 0, refused = 0;
    for (int turn = 0; turn < 40000; turn++) {
        enum proto_record which = (enum proto_record)(random_u64() % RECORD_COUNT);
        union any_record in, out;
        struct err err = {0};
        random_of(which, &in);
        struct proto_buffer b = encoded(which, &in);
        uint8_t *exact = malloc(b.length);
        memcpy(exact, b.data, b.length);
        mutate(exact, b.length);
        calloc_bytes = 0;
        if (proto_decode(exact, b.length, which, &out, &err) == 0) {
            struct proto_buffer c = encoded(which, &out);
            assert_int_equal(b.length, c.length);
            assert_memory_equal(exact, c.data, b.length);
            proto_buffer_release(&c);
            proto_decoded_release(which, &out);
            accepted++;
        } else {
            assert_int_equal(err.code, ERR_PROTOCOL);
            refused++;
        }
        assert_true(calloc_bytes <= 8 * b.length);
        free(exact);
        proto_decoded_release(which, &in);
        proto_buffer_release(&b);
    }
    assert_true(accepted > 1000 && refused > 1000); /* else the damage says nothing */
}

static int decode_hex(const char *hex, enum proto_record which, struct err *err) {
    uint8_t bytes[512];
    union any_record out;
    size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) sscanf(hex + 2 * i, "%2hhx", &bytes[i]);
    int result = proto_decode(bytes, n, which, &out, err);
    if (result == 0) proto_decoded_release(which, &out);
    return result;
}

#define ZERO32 "c4200000000000000000000000000000000000000000000000000000000000000000"

/* What exactly is refused, and that the message names the record and the field. */
static void refusals_name_record_and_field(void **state) {
    (void)state;
    static const struct {
        enum proto_record which;
        const char *hex, *text;
    } wrong[] = {
        {RECORD_lease_ask, "", "LEASE_ASK: the payload of 0 bytes ends here"},
        {RECORD_lease_ask, "91", "LEASE_ASK.samples: the payload of 1 bytes ends here"},
        {RECORD_lease_ask, "91c1", "LEASE_ASK.samples: byte 0xc1 is not msgpack"},
        {RECORD_lease_ask, "90", "LEASE_ASK: 0 fields, not 1"},
        {RECORD_lease_ask, "920101", "LEASE_ASK: 2 fields, not 1"},
        {RECORD_lease_ask, "8101", "LEASE_ASK: a map, not an array"},
        {RECORD_lease_ask, "05", "LEASE_ASK: an integer, not an array"},
        {RECORD_lease_ask, "dc000105", "LEASE_ASK: an array that is not in its shortest form"},
        {RECORD_lease_ask, "91ce00100001", "LEASE_ASK.samples: 1048577, at most 1048576"},
        {RECORD_lease_ask, "91ce00000005",
         "LEASE_ASK.samples: an integer that is not in its shortest"},
        {RECORD_lease_ask, "91ff",
         "LEASE_ASK.samples: a negative integer, not an unsigned integer"},
        {RECORD_lease_ask, "91d005",
         "LEASE_ASK.samples: a negative integer, not an unsigned integer"},
        {RECORD_lease_ask, "91c3", "LEASE_ASK.samples: a boolean, not an unsigned integer"},
        {RECORD_lease_ask, "91c0", "LEASE_ASK.samples: nil, not an unsigned integer"},
        {RECORD_lease_ask, "91d40500", "LEASE_ASK.samples: an extension, not"},
        {RECORD_lease_ask, "91cb3ff0000000000000", "LEASE_ASK.samples: a float64, not an unsigned"},
        {RECORD_lease_ask, "910100", "LEASE_ASK: 1 bytes follow its end"},
        {RECORD_leases, "91910102030405", "LEASES.leases[0]: an integer, not an array"},
        {RECORD_leases, "91929401020304940102c003", "LEASES.leases[1].start: nil, not an unsigned"},
        {RECORD_leases, "91dc0101", "LEASES.leases: 257 records, at most 256"},
        {RECORD_leases, "91dc0100", "LEASES.leases: 256 records do not fit into the 0 bytes left"},
        {RECORD_leases, "91ddffffffff", "LEASES.leases: 4294967295 records, at most 256"},
        {RECORD_bye, "930601a2c3", "BYE.reason: the payload of 5 bytes ends here"},
        {RECORD_bye, "930601a2c328", "BYE.reason: not UTF-8 without control characters"},
        {RECORD_bye, "930601c4026868", "BYE.reason: a byte string, not a string"},
        {RECORD_bye, "930602a0", "BYE.final: 2, at most 1"},
        {RECORD_bye, "93cd010001a0", "BYE.code: 256, at most 255"},
        {RECORD_root, "9201c4020000", "ROOT.root: 2 bytes, not 32"},
        {RECORD_root, "9201a0", "ROOT.root: a string, not a byte string"},
        {RECORD_root, "92d30000000000000001" ZERO32, "ROOT.index: a negative integer, not"},
        {RECORD_moments_get, "91cf0000000100000000",
         "MOMENTS_GET.fragment: 4294967296, at most 4294967295"},
        {RECORD_plan,
         "99000000"
         "00d3ffffffff7fffffff00909090",
         "PLAN.grid_exponent: outside 32 bits"},
        {RECORD_plan, "9900000000ce8000000000909090", "PLAN.grid_exponent: outside 32 bits"},
        {RECORD_plan, "9900000000d2ffffffff00909090",
         "PLAN.grid_exponent: a negative integer that is not"},
        {RECORD_heartbeat, "980000cb7ff0000000000000cb00000000000000000000000090",
         "loss: not a finite"},
        {RECORD_heartbeat, "980000cbfff8000000000000cb00000000000000000000000090",
         "loss: not a finite"},
        {RECORD_heartbeat, "980000ca3f800000cb00000000000000000000000090",
         "loss: a float32, not a float64"},
        {RECORD_contributor, "960101cb3ff000000000000001" ZERO32 "cb0000000000000000",
         "contributor.clip: a float64, not a float32"},
        {RECORD_contributor, "960101ca7f80000001" ZERO32 "cb0000000000000000",
         "contributor.clip: not a finite number"},
        {RECORD_want, "930001c60000000100",
         "WANT.chunks: a byte string that is not in its shortest form"},
        {RECORD_want, "930001c60000200100", "WANT.chunks: the payload of 9 bytes ends here"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_refused(decode_hex(wrong[i].hex, wrong[i].which, err), ERR_PROTOCOL, wrong[i].text);
    struct err none = {0};
    assert_int_equal(decode_hex("91ce00100000", RECORD_lease_ask, &none), 0);
    assert_int_equal(decode_hex("930601a0", RECORD_bye, &none), 0);
}

/* Our own slips are caught before they are signed or sent, and leave the buffer as it was. */
static void encoder_keeps_the_limits_too(void **state) {
    (void)state;
    struct proto_buffer b;
    proto_buffer_init(&b, 64);
    proto_buffer_append(&b, "before", 6);
    struct msg_bye bye = {.final = 2};
    assert_refused(proto_encode(&b, RECORD_bye, &bye, err), ERR_PROTOCOL,
                   "BYE.final: 2, at most 1");
    bye = (struct msg_bye){.reason = proto_str("two\nlines")};
    assert_refused(proto_encode(&b, RECORD_bye, &bye, err), ERR_PROTOCOL, "BYE.reason: not UTF-8");
    char much[PROTO_TEXT_BYTES_MAX + 2];
    memset(much, 'x', sizeof much);
    much[sizeof much - 1] = '\0';
    bye.reason = proto_str(much);
    assert_refused(proto_encode(&b, RECORD_bye, &bye, err), ERR_PROTOCOL,
                   "BYE.reason: 241 bytes, at most 240");
    bye.reason.length = 100;
    assert_refused(proto_encode(&b, RECORD_bye, &bye, err), ERR_FULL, "does not fit into 64 bytes");
    struct msg_heartbeat hb = {.loss = (double)NAN};
    assert_refused(proto_encode(&b, RECORD_heartbeat, &hb, err), ERR_PROTOCOL,
                   "HEARTBEAT.loss: not a finite");
    struct msg_lease lease[300] = {{0}};
    struct msg_leases leases = {lease, 257};
    assert_refused(proto_encode(&b, RECORD_leases, &leases, err), ERR_PROTOCOL,
                   "257 records, at most 256");
    assert_int_equal(b.length, 6);
    assert_false(b.failed);
    bye.reason.length = 10;
    assert_int_equal(proto_encode(&b, RECORD_bye, &bye, NULL), 0);
    proto_buffer_release(&b);
}

static void text_must_be_plain_utf8(void **state) {
    (void)state;
    static const struct {
        const char *text;
        bool ok;
    } cases[] = {
        {"plain", true},
        {"\xc2\xa0", true},
        {"\xed\x9f\xbf", true},
        {"\xf4\x8f\xbf\xbf", true},
        {"tab\there", false},
        {"\x7f", false},
        {"\xc2\x85", false},
        {"\xc0\xaf", false},
        {"\xe0\x80\xaf", false},
        {"\xed\xa0\x80", false},
        {"\xf4\x90\x80\x80", false},
        {"\xf8\x88\x80\x80\x80", false},
        {"\x80", false},
        {"\xe4\xb8", false},
        {"\x1b[31m", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct proto_buffer b;
        proto_buffer_init(&b, 100);
        struct msg_bye bye = {.reason = proto_str(cases[i].text)};
        assert_int_equal(proto_encode(&b, RECORD_bye, &bye, NULL) == 0, cases[i].ok);
        proto_buffer_release(&b);
    }
    char out[6];
    proto_str_copy(proto_str("abcd\xc3\xa9"), out, sizeof out); /* never half a character */
    assert_string_equal(out, "abcd");
    proto_str_copy(proto_str("abc\xc3\xa9"), out, sizeof out);
    assert_string_equal(out, "abc\xc3\xa9");
}

static void types_have_names(void **state) {
    (void)state;
    assert_string_equal(proto_type_name(MSG_READY), "READY");
    assert_string_equal(proto_type_name(200), "unknown");
    assert_int_equal(proto_record_of_type(MSG_READY), RECORD_ready);
    assert_int_equal(proto_record_of_type(0), -1);
    assert_string_equal(proto_record_name(RECORD_lease), "lease");
    /* A link between members must carry the largest message members exchange. */
    assert_true(proto_record_bytes_max(RECORD_chunk) <= PROTO_FRAME_BYTES_MAX);
    assert_true(proto_record_bytes_max(RECORD_state) <= PROTO_FRAME_BYTES_MAX);
    assert_true(proto_record_bytes_max(RECORD_enrol) <= PROTO_STRANGER_BYTES_MAX);
    assert_true(proto_record_bytes_max(RECORD_hello) <= PROTO_STRANGER_BYTES_MAX);
}

/* ---- documentation ---------------------------------------------------------------------------- */

static int type_of(enum proto_record which) {
    for (int type = 0; type < 256; type++)
        if (proto_record_of_type((uint8_t)type) == (int)which) return type;
    return -1;
}

/* "`count` u64", "`chunks` u32 <= 65536", "`name` str <= 64 bytes", "`ranges` [lease] <= 256". */
static void describe_field(const struct field *f, char *out, size_t size) {
    static const char *const kinds[] = {"u8",     "u32", "u64", "i32",   "f32", "f64",
                                        "digest", "key", "sig", "bytes", "str"};
    static const uint64_t widths[] = {UINT8_MAX, UINT32_MAX, UINT64_MAX, INT32_MAX, 0,
                                      0,         32,         32,         64};
    unsigned long long max = f->max;
    if (f->kind == KIND_LIST)
        snprintf(out, size, "`%s` [%s] <= %llu", f->name, proto_record_name(f->record), max);
    else if (f->kind >= KIND_BYTES)
        snprintf(out, size, "`%s` %s <= %llu bytes", f->name, kinds[f->kind], max);
    else if (f->max == widths[f->kind])
        snprintf(out, size, "`%s` %s", f->name, kinds[f->kind]);
    else
        snprintf(out, size, "`%s` %s <= %llu", f->name, kinds[f->kind], max);
}

static void describe_record(enum proto_record which, char *line, size_t size) {
    const struct schema *s = schema_of(which);
    int type = type_of(which);
    size_t used = 0;
    if (type < 0)
        used += (size_t)snprintf(line, size, "| %s | ", s->name);
    else
        used += (size_t)snprintf(line, size, "| %d | %s | ", type, s->name);
    for (uint32_t i = 0; i < s->field_count; i++) {
        char field[128];
        describe_field(&s->fields[i], field, sizeof field);
        used += (size_t)snprintf(line + used, size - used, "%s%s", i ? ", " : "", field);
    }
    snprintf(line + used, size - used, " |\n");
}

/* docs/protocol.md is what a node in another language is written from. A line that is not there is
 * printed, to be put in its place. */
static void documentation_has_every_record(void **state) {
    (void)state;
    FILE *f = fopen("docs/protocol.md", "r");
    static char text[1 << 18];
    if (!f) fail_msg("docs/protocol.md: run the tests from the repository's root");
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    unsigned missing = 0;
    for (enum proto_record which = 0; which < RECORD_COUNT; which++) {
        char line[2048];
        describe_record(which, line, sizeof line);
        const char *at = strstr(text, "\n## Records");
        if (at && strstr(at, line)) continue;
        print_message("%s", line);
        missing++;
    }
    assert_int_equal(missing, 0);
    /* Nothing else stands in its tables: a reader that takes them from there would follow it. */
    unsigned rows = 0;
    for (const char *at = strstr(text, "\n## Records"); (at = strstr(at, "\n| ")); at++) rows++;
    assert_int_equal(rows, RECORD_COUNT + 2); /* and the heads of two tables */
}

/* ---- frames ----------------------------------------------------------------------------------- */

static void frame_header_goes_both_ways(void **state) {
    (void)state;
    struct frame in = {
        .type = MSG_CHUNK, .length = 70000, .term = 3, .session = 0x0102030405060708, .plan = 9};
    struct frame out;
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES];
    struct err err = {0};
    frame_write(&in, bytes);
    assert_hex(bytes, sizeof bytes,
               "49544c31"
               "01"
               "22"
               "0000"
               "70110100"
               "0300000000000000"
               "0807060504030201"
               "0900000000000000");
    assert_int_equal(frame_read(bytes, 70000, &out, &err), 0);
    assert_int_equal(out.type, in.type);
    assert_int_equal(out.length, in.length);
    assert_int_equal(out.term, in.term);
    assert_int_equal(out.session, in.session);
    assert_int_equal(out.plan, in.plan);
}

/* These are the first words two strangers exchange, so each mistake gets its own sentence. */
static void wrong_frames_say_what_is_wrong(void **state) {
    (void)state;
    static const struct {
        size_t at;
        const char *put, *text;
    } wrong[] = {
        {0, "GET / HTTP/1.1\r\n", "this looks like HTTP"},
        {0, "\x16\x03\x01\x02", "TLS inside TLS"},
        {0, "ITL2", "another generation"},
        {0, "xxxx", "starts with 78 78 78 78: this is not the intellect protocol"},
        {4, "\x02", "protocol version 2, this program speaks 1"},
        {5, "\xc8", "unknown type 200"},
        {6, "\x01", "LEASE_ASK frame: reserved bytes"},
        {8, "\x65", "LEASE_ASK frame of 101 bytes, allowed are 1 to 100"},
        {11, "\xff", "allowed are 1 to 100"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct frame f = {.type = MSG_LEASE_ASK, .length = 100};
        uint8_t bytes[PROTO_FRAME_HEADER_BYTES];
        frame_write(&f, bytes);
        memcpy(bytes + wrong[i].at, wrong[i].put, strlen(wrong[i].put));
        assert_refused(frame_read(bytes, 100, &f, err), ERR_PROTOCOL, wrong[i].text);
    }
    struct frame empty = {.type = MSG_BYE};
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES];
    frame_write(&empty, bytes);
    assert_refused(frame_read(bytes, 100, &empty, err), ERR_PROTOCOL, "BYE frame of 0 bytes");
}

static int set_up(void **state) {
    (void)state;
    fill_junk();
    return proto_init(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_bytes),
        cmocka_unit_test(every_record_goes_round),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(damaged_payloads_are_harmless),
        cmocka_unit_test(refusals_name_record_and_field),
        cmocka_unit_test(encoder_keeps_the_limits_too),
        cmocka_unit_test(text_must_be_plain_utf8),
        cmocka_unit_test(types_have_names),
        cmocka_unit_test(documentation_has_every_record),
        cmocka_unit_test(frame_header_goes_both_ways),
        cmocka_unit_test(wrong_frames_say_what_is_wrong),
    };
    return cmocka_run_group_tests_name("proto", tests, set_up, NULL);
}
