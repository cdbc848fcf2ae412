-- The tables of the task service, as a new database gets them. In a database that has older ones,
-- schema.py adds what is missing.

-- States -----------------------------------------------------------------------------------------
-- pending  ожидает обработки       create-task, or a retry; the dispatcher will pick it
-- sent     отправлено на обработку  the dispatcher has handed it to the broker
-- error    ошибка                  its last attempt failed, or an operator cancelled it
-- success  успешно                 a consumer finished its current attempt
DO $$
BEGIN
    CREATE TYPE task_status AS ENUM ('pending', 'sent', 'error', 'success');
EXCEPTION
    WHEN duplicate_object THEN NULL;
END
$$;

CREATE TABLE tasks (
    id          uuid             NOT NULL DEFAULT gen_random_uuid(),
    text        text             NOT NULL,
    status      task_status      NOT NULL DEFAULT 'pending',
    -- The fencing token: what ends an attempt raises it, and a report of an older one is stale.
    attempt     integer          NOT NULL DEFAULT 1,
    -- Attempts that failed; compared with MAX_ATTEMPTS.
    failures    integer          NOT NULL DEFAULT 0,
    -- How often a suspect of this attempt was allowed to start; three mean it kills its worker.
    starts      integer          NOT NULL DEFAULT 0,
    -- The last of them: the same start asked for twice, after a time-out, counts once.
    start_token text,
    -- The consumer that runs it without a message. The nil UUID: a message is out again, and
    -- somebody held the task before.
    holder      uuid,
    -- When a sent row may be rescued: its holder, or its message, is gone by then.
    lease_until timestamptz,
    -- A run that takes longer has failed; null leaves that to the consumer.
    timeout_seconds double precision,
    -- Waits for run_at. An index predicate cannot hold now(), so the flag says it.
    delayed     boolean          NOT NULL DEFAULT false,
    -- Where the random pick finds the row. Not the id: clients may send time-ordered UUIDs.
    pick        double precision NOT NULL DEFAULT random(),
    result      text,
    error       text,
    run_at      timestamptz,
    created_at  timestamptz      NOT NULL DEFAULT now(),
    sent_at     timestamptz,
    finished_at timestamptz,
    -- The last run, as its consumer says: where, since when, for how long.
    host        text,
    started_at  timestamptz,
    seconds     double precision,
    -- The newest 20 runs that did not succeed, and retries; see database.APPEND_TO_HISTORY.
    history     jsonb,
    CONSTRAINT tasks_pkey PRIMARY KEY (id),
    CONSTRAINT tasks_attempt_is_positive CHECK (attempt >= 1),
    CONSTRAINT tasks_only_pending_is_delayed CHECK (NOT delayed OR status = 'pending')
) WITH (
    -- Each task leaves two dead rows and their entries in the hot indexes: vacuum early, unthrottled.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_cost_delay = 0
);

-- Who takes tasks, by the last heartbeat of each. Unlogged: after a crash each says it again.
CREATE UNLOGGED TABLE IF NOT EXISTS consumers (
    id          uuid        NOT NULL,
    host        text        NOT NULL,
    concurrency integer     NOT NULL,
    busy        integer     NOT NULL DEFAULT 0,
    version     text        NOT NULL,
    -- [{"taskId", "attempt", "seconds", "state"}], what it has in flight, the longest run first
    tasks       jsonb       NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT consumers_pkey PRIMARY KEY (id)
);

-- While this has its one row, no dispatcher claims anything.
CREATE TABLE IF NOT EXISTS pause (
    only_row boolean     NOT NULL DEFAULT true,
    since    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pause_pkey PRIMARY KEY (only_row),
    CONSTRAINT pause_has_one_row CHECK (only_row)
);

-- What each producer has counted in a minute. waits, runs: how many tasks by the upper bound of
-- their seconds, {"0.5": 12}.
CREATE TABLE IF NOT EXISTS minutes (
    minute   timestamptz NOT NULL,
    producer uuid        NOT NULL,
    created  integer     NOT NULL,
    success  integer     NOT NULL,
    error    integer     NOT NULL,
    waits    jsonb       NOT NULL,
    runs     jsonb       NOT NULL,
    CONSTRAINT minutes_pkey PRIMARY KEY (minute, producer)
);

-- Indexes ----------------------------------------------------------------------------------------
-- Each is one statement from CREATE INDEX to the semicolon: schema.py reads them, to build a missing
-- one beside the traffic.

-- CLAIM_RANDOM_TASKS walks this upward from random places.
CREATE INDEX tasks_pending ON tasks (pick) WHERE status = 'pending' AND NOT delayed;

-- RELEASE_DUE_TASKS finds the delayed rows whose time has come.
CREATE INDEX tasks_delayed ON tasks (run_at) WHERE delayed;

-- RESCUE_LOST_TASKS reads every sent row, a few thousand; lease_until stays unindexed, so that a
-- renewal moves no index entry.
CREATE INDEX tasks_sent ON tasks (id) WHERE status = 'sent';

-- Lists of what has ended, and the retention. Each task enters one of them once, at its end.
CREATE INDEX tasks_success ON tasks (finished_at, id) WHERE status = 'success';
CREATE INDEX tasks_error ON tasks (finished_at, id) WHERE status = 'error';
