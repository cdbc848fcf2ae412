-- The one table of the task service. The producer applies this file at every start, under an
-- advisory lock, so everything here is idempotent.

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

CREATE TABLE IF NOT EXISTS tasks (
    id          uuid             NOT NULL DEFAULT gen_random_uuid(),
    text        text             NOT NULL,
    status      task_status      NOT NULL DEFAULT 'pending',
    -- The fencing token: whatever ends an attempt raises it, and a report of an older one is stale.
    attempt     integer          NOT NULL DEFAULT 1,
    -- Attempts that failed; held against MAX_ATTEMPTS.
    failures    integer          NOT NULL DEFAULT 0,
    -- How often a redelivered message of this attempt was begun; three mean it kills its worker.
    starts      integer          NOT NULL DEFAULT 0,
    -- The last of them: the same start reported twice, after a time-out, counts once.
    start_token text,
    -- Waits for run_at. An index predicate cannot hold now(), so the flag says it.
    held        boolean          NOT NULL DEFAULT false,
    -- Where the random pick finds the row. Not the id: clients may send time-ordered UUIDs.
    pick        double precision NOT NULL DEFAULT random(),
    result      text,
    error       text,
    run_at      timestamptz,
    created_at  timestamptz      NOT NULL DEFAULT now(),
    -- When it was sent, or when its consumer last said that it holds it.
    sent_at     timestamptz,
    finished_at timestamptz,
    CONSTRAINT tasks_pkey PRIMARY KEY (id),
    CONSTRAINT tasks_attempt_is_positive CHECK (attempt >= 1),
    CONSTRAINT tasks_only_pending_is_held CHECK (NOT held OR status = 'pending')
);

-- Indexes ----------------------------------------------------------------------------------------
-- CLAIM_TASKS walks this upward from a random pivot.
CREATE INDEX IF NOT EXISTS tasks_pending ON tasks (pick) WHERE status = 'pending' AND NOT held;

-- RELEASE_DUE_TASKS finds the held rows whose time has come.
CREATE INDEX IF NOT EXISTS tasks_held ON tasks (run_at) WHERE held;

-- RESCUE_LOST_TASKS reads every sent row, a few thousand; sent_at stays unindexed, so that a
-- consumer's touch moves no index entry.
CREATE INDEX IF NOT EXISTS tasks_sent ON tasks (id) WHERE status = 'sent';
