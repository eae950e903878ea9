# Hundreds of processes that stream, halt, die, send bad requests and switch adapters, for some
# minutes: every request has exactly one end, answers of control requests never change, and at the end
# nothing is left.
#
#     make soak MINUTES=5            # or: mix run scripts/soak.exs 5 [{mlx,cpu} | cpu | gpu]

defmodule Soak do
  alias Bombus.{Error, Native, Serving}

  @visitors 300
  @topics ~w(coffee tea rain cats bees hiking bread music)

  def run(minutes, device) do
    IO.puts("#{@visitors} processes on #{inspect(device)}, #{minutes} minutes")

    IO.puts(
      "Every two seconds a step is made to fail, by an error or a panic: lines such as " <>
        "\"thread ... panicked\" and \"a test asked for it\" are meant to come. A failure of the soak begins with PROBLEM."
    )

    before = settled()
    threads = threads()
    # In a process of its own: what it holds goes with it.
    report = Task.async(fn -> work(minutes, device) end) |> Task.await(:infinity)
    # The engine's and the kernels' threads wait for the next model.
    problems = report.problems ++ left_over(device, before, threads)
    IO.puts("ends: #{inspect(report.ends)}, memory at most #{report.peak} sequences")

    if problems == [] do
      IO.puts("nothing leaked, every request had one end, the control answers never changed")
    else
      for problem <- Enum.uniq(problems) |> Enum.take(20), do: IO.puts("PROBLEM: #{problem}")
      System.halt(1)
    end
  end

  defp work(minutes, device) do
    # A queue that overflows, and a cache that evicts.
    options = [device: device, max_batch_size: 24, max_queue: 120, prefix_cache: 8_000_000]
    model = Bombus.load_model!(:demo, options)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Serving.new(model, tokenizer, max_new_tokens: 60)

    {:ok, supervisor} =
      Supervisor.start_link([{Serving, serving: serving, name: Soak.LLM}], strategy: :one_for_one)

    adapters = [nil | for(name <- ~w(pirate news), do: Bombus.load_adapter!({:demo, name}))]

    # How a request is answered when nobody else asks.
    control =
      for topic <- @topics, {adapter, place} <- Enum.with_index(adapters), into: %{} do
        input = %{text: "Write a post about #{topic}", adapter: adapter}
        {{topic, place}, answer(Serving.run!(serving, input))}
      end

    until = System.monotonic_time(:millisecond) + round(minutes * 60_000)

    shared = %{
      serving: serving,
      model: model,
      adapters: adapters,
      control: control,
      until: until,
      collector: self()
    }

    faults = spawn_link(fn -> break(shared) end)

    visitors =
      for seed <- 1..@visitors, do: {spawn_monitor(fn -> visitor(shared, seed) end), seed}

    visitors = Map.new(visitors, fn {{pid, monitor}, seed} -> {monitor, {pid, seed}} end)
    report = gather(visitors, shared, %{ends: %{}, problems: [], peak: 0})
    send(faults, :stop)
    Supervisor.stop(supervisor)
    report
  end

  # Until all visitors are gone; one that was killed is followed by another.
  defp gather(visitors, _shared, report) when visitors == %{}, do: report

  defp gather(visitors, shared, report) do
    receive do
      {:ended, kind} ->
        peak = if :rand.uniform(50) == 1, do: Bombus.memory_info().sequences, else: 0
        ends = Map.update(report.ends, kind, 1, &(&1 + 1))
        gather(visitors, shared, %{report | ends: ends, peak: max(report.peak, peak)})

      {:problem, problem} ->
        gather(visitors, shared, %{report | problems: [problem | report.problems]})

      {:DOWN, monitor, :process, _pid, reason} ->
        {{_pid, seed}, visitors} = Map.pop!(visitors, monitor)

        report =
          if reason in [:normal, :killed],
            do: report,
            else: update_in(report.problems, &["a visitor ended: #{inspect(reason)}" | &1])

        if reason == :killed and time_left?(shared) do
          {pid, monitor} = spawn_monitor(fn -> visitor(shared, seed + 1000) end)
          gather(Map.put(visitors, monitor, {pid, seed + 1000}), shared, report)
        else
          gather(visitors, shared, report)
        end
    end
  end

  defp time_left?(shared), do: System.monotonic_time(:millisecond) < shared.until

  defp visitor(shared, seed) do
    :rand.seed(:exsss, seed)
    visit_again(shared)
  end

  defp visit_again(shared) do
    if time_left?(shared) do
      kind =
        Enum.random([
          :control,
          :control,
          :stream,
          :halt,
          :raise,
          :bad,
          :many,
          :score,
          :fresh_adapter,
          :die
        ])

      tell = fn ended -> send(shared.collector, {:ended, {kind, ended}}) end
      visit(kind, shared, tell)
      check_mailbox(shared, kind)
      Process.sleep(:rand.uniform(3_000))
      visit_again(shared)
    end
  end

  defp check_mailbox(shared, kind) do
    with {:messages, [_ | _] = messages} <- Process.info(self(), :messages) do
      problem(shared, "#{kind} left messages: #{inspect(messages, limit: 5)}")
    end
  end

  defp problem(shared, text), do: send(shared.collector, {:problem, text})

  defp visit(:control, shared, tell) do
    {topic, place} = key = Enum.random(Map.keys(shared.control))
    input = %{text: "Write a post about #{topic}", adapter: Enum.at(shared.adapters, place)}

    case Serving.batched_run(Soak.LLM, input) do
      %{results: _} = result ->
        if answer(result) != shared.control[key],
          do: problem(shared, "another answer: #{inspect(answer(result))}")

        tell.(:done)

      {:error, error} ->
        expected(shared, error, tell)
    end
  end

  defp visit(:stream, shared, tell) do
    input = %{
      text: prompt(),
      temperature: 1.0,
      stream_done: true,
      seed: :rand.uniform(1000),
      adapter: Enum.random(shared.adapters)
    }

    elements = Enum.to_list(Serving.stream(Soak.LLM, input))
    {text, [done: %{results: [result]}]} = Enum.split(elements, -1)
    if Enum.join(text) != result.text, do: problem(shared, "a stream is not its result")
    tell.(:done)
  rescue
    error in Error -> expected(shared, error, tell)
  end

  defp visit(:halt, shared, tell) do
    shared.serving |> Serving.stream(prompt()) |> Enum.take(:rand.uniform(5))
    tell.(:halted)
  rescue
    error in Error -> expected(shared, error, tell)
  end

  defp visit(:raise, shared, tell) do
    Enum.each(Serving.stream(shared.serving, prompt()), fn _text ->
      if :rand.uniform(4) == 1, do: raise("enough")
    end)

    tell.(:done)
  rescue
    RuntimeError -> tell.(:raised)
    error in Error -> expected(shared, error, tell)
  end

  defp visit(:bad, shared, tell) do
    wrong =
      Enum.random([
        %{text: ""},
        %{text: "a", temperature: -1},
        %{token_ids: [-1]},
        %{text: <<0xFF>>},
        %{prompt: "a"}
      ])

    try do
      case Serving.run(shared.serving, wrong) do
        {:error, %Error{reason: :bad_request}} -> :ok
        other -> problem(shared, "no error for #{inspect(wrong)}: #{inspect(other)}")
      end
    rescue
      ArgumentError -> :ok
    end

    case Serving.run(shared.serving, %{token_ids: List.duplicate(5, 3000)}) do
      {:error, %Error{reason: reason}} when reason in [:prompt_too_long, :overloaded] ->
        tell.(reason)

      other ->
        problem(shared, "a prompt too long: #{inspect(other)}")
    end
  end

  defp visit(:many, shared, tell) do
    inputs =
      for _ <- 1..5,
          do: %{
            text: prompt(),
            max_new_tokens: :rand.uniform(20),
            adapter: Enum.random(shared.adapters)
          }

    for result <- Serving.run(shared.serving, inputs) do
      case result do
        %{results: [_one]} -> tell.(:done)
        {:error, error} -> expected(shared, error, tell)
      end
    end
  end

  defp visit(:score, shared, tell) do
    case Bombus.score(shared.model, Enum.to_list(1..:rand.uniform(50)//1) ++ [1, 2],
           adapter: Enum.random(shared.adapters)
         ) do
      {:ok, scores} ->
        if Enum.all?(scores, &is_float/1),
          do: tell.(:done),
          else: problem(shared, "scores: #{inspect(scores)}")

      {:error, error} ->
        expected(shared, error, tell)
    end
  end

  defp visit(:fresh_adapter, shared, tell) do
    adapter = Bombus.load_adapter!({:demo, Enum.random(~w(pirate news))})

    case Serving.run(shared.serving, %{text: prompt(), adapter: adapter, max_new_tokens: 5}) do
      %{results: [_one]} -> tell.(:done)
      {:error, error} -> expected(shared, error, tell)
    end
  end

  # Dies with a request in the queue, in prefill or in mid-stream.
  defp visit(:die, shared, tell) do
    visitor = self()
    tell.(:killed)
    spawn(fn -> Process.sleep(:rand.uniform(60)) && Process.exit(visitor, :kill) end)
    for _ <- 1..1000, do: Serving.run(shared.serving, prompt())
  end

  defp prompt,
    do: Enum.random(["Write a post about ", "Tell me about ", "I like "]) <> Enum.random(@topics)

  # What may happen when there is too much to do, or a step has failed.
  defp expected(_shared, %Error{reason: reason}, tell)
       when reason in [:overloaded, :panic, :backend],
       do: tell.(reason)

  defp expected(shared, error, _tell), do: problem(shared, "an error: #{inspect(error)}")

  # Now and then a step fails.
  defp break(shared) do
    receive do
      :stop -> :ok
    after
      2_000 ->
        Native.fail_next_step(shared.model.ref, Enum.random([:panic, :error]))
        break(shared)
    end
  end

  defp answer(%{results: [%{token_ids: ids, text: text, finish_reason: reason}]}),
    do: {ids, text, reason}

  defp left_over(device, before, threads_before) do
    now = settled()
    # MLX keeps memory for its next arrays.
    cached = if device == :cpu, do: [:cached], else: []

    gone =
      for key <- [:active, :kv, :models, :adapters, :sequences] ++ cached,
          now[key] > before[key],
          do: "#{key}: #{before[key]} before, #{now[key]} now"

    threads = threads()
    # Those of the engine, of its texts (which end with it), and of the kernels wait for the next.
    more =
      if threads > threads_before + System.schedulers_online() + 4,
        do: ["threads: #{threads_before} before, #{threads} now"],
        else: []

    gone ++ more
  end

  # Models and adapters go when their handles are collected.
  defp settled do
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)
    Process.sleep(500)
    Bombus.memory_info()
  end

  defp threads do
    case File.ls("/proc/self/task") do
      {:ok, tasks} -> length(tasks)
      {:error, _reason} -> 0
    end
  end
end

device =
  case System.argv() do
    [_minutes, "{mlx,cpu}"] -> {:mlx, :cpu}
    [_minutes, "gpu"] -> :gpu
    _other -> :cpu
  end

minutes =
  case System.argv() do
    [minutes | _device] -> minutes |> Float.parse() |> elem(0)
    [] -> 5
  end

Logger.configure(level: :critical)
Soak.run(minutes, device)
