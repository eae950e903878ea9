defmodule Bombus.Serving.Server do
  @moduledoc false
  # A named process that holds a serving. Another process loads the model, so that this one always
  # answers. Requests do not pass through it: it hands the serving out, and its end is theirs.

  use GenServer

  require Logger

  alias Bombus.{Error, Native}
  alias Bombus.Serving.{Fault, Loader}

  # How often it looks whether the last request has ended.
  @nap 5

  # How long callers wait while the model loads, where nobody says.
  @patience 60_000

  # Before a load that has failed is tried again: doubled each time.
  @first_pause 1_000
  @longest_pause 60_000

  defstruct [
    :new,
    :options,
    :state,
    :serving,
    :loader,
    :probe,
    :progress,
    :ready_at,
    failures: 0,
    waiting: %{}
  ]

  @doc "`new` makes a serving, as `Bombus.Serving.new/3`."
  def start_link(new, options) do
    GenServer.start_link(__MODULE__, {new, options}, name: options[:name])
  rescue
    # What `via` names is asked here, in the caller.
    _error in [FunctionClauseError, UndefinedFunctionError] -> Loader.bad_name!(options[:name])
  end

  @impl true
  def init({new, options}) do
    Process.flag(:trap_exit, true)
    state = %__MODULE__{new: new, options: options, state: :loading}

    case Loader.given(options, new) do
      nil -> {:ok, state, {:continue, :load}}
      {:ok, serving} -> {:ok, ready(state, serving)}
      {:error, error} -> {:stop, error}
    end
  end

  @impl true
  def handle_continue(:load, state), do: {:noreply, load(state)}

  @impl true
  def handle_call({:checkout, timeout}, from, state) do
    case state = looked_at(state) do
      %{state: {:failed, error}} -> {:reply, {:error, error}, state}
      %{state: :ready, probe: nil} -> {:reply, {:ok, state.serving, self()}, state}
      _soon -> {:noreply, wait(state, from, timeout)}
    end
  end

  def handle_call(:status, _from, state) do
    state = looked_at(state)
    {:reply, status(state), state}
  end

  def handle_call(_other, _from, state) do
    {:reply, Error.error(:unsupported, "another version of Bombus runs on #{node()}"), state}
  end

  @impl true
  def handle_cast(_other, state), do: {:noreply, state}

  @impl true
  def handle_info(:load, %{state: {:failed, _error}} = state), do: {:noreply, load(state)}

  def handle_info({:progress, loader, progress}, %{loader: loader} = state),
    do: {:noreply, %{state | progress: progress}}

  def handle_info({:loaded, loader, answer}, %{loader: loader} = state) do
    case answer do
      {:ok, serving} -> {:noreply, ready(state, serving)}
      {:error, error} -> {:noreply, failed(state, error)}
    end
  end

  def handle_info({:EXIT, loader, reason}, %{loader: loader} = state) do
    {:error, error} = Error.error(:stopped, "what loaded the model has ended: #{inspect(reason)}")
    {:noreply, failed(state, error)}
  end

  # It may have been the request's own adapter: the model itself is asked.
  def handle_info({:suspect, ref}, %{probe: nil, serving: %{model: %{ref: ref} = model}} = state) do
    server = self()
    probe = spawn_link(fn -> send(server, {:probed, self(), Loader.probe(model)}) end)
    {:noreply, %{state | probe: probe}}
  end

  def handle_info({:probed, probe, answer}, %{probe: probe} = state) do
    state = %{state | probe: nil}

    case answer do
      {:error, error} -> {:noreply, suspected(state, error)}
      _it_answers -> {:noreply, sound(state)}
    end
  end

  def handle_info({:give_up, monitor}, state) do
    {:error, error} = Error.error(:loading, "#{name(state)} still loads its model")
    {:noreply, answer(state, [monitor], {:error, error})}
  end

  def handle_info({:cancel, pid}, state) do
    theirs = for {monitor, {^pid, _tag}} <- state.waiting, do: monitor
    {:noreply, answer(state, theirs, :cancelled)}
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state),
    do: {:noreply, %{state | waiting: Map.delete(state.waiting, monitor)}}

  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    if state.loader, do: Process.exit(state.loader, :kill)
    answer(state, Map.keys(state.waiting), stopping())
    if state.serving, do: drain(state.serving.group, Keyword.get(state.options, :drain, 0))
  end

  defp suspected(state, error),
    do: if(Fault.end?(error), do: broken(state, error), else: sound(state))

  defp sound(state), do: answer(state, Map.keys(state.waiting), {:ok, state.serving, self()})

  defp load(%{options: options} = state) do
    server = self()

    loader =
      spawn_link(fn ->
        tell = &send(server, {:progress, self(), &1})
        send(server, {:loaded, self(), Loader.serving(options, state.new, tell)})
      end)

    %{state | state: :loading, loader: loader, progress: nil}
  end

  defp ready(state, serving) do
    # A group of its own, whose requests it can count.
    group = Native.new_group(serving.limits)
    serving = %{serving | group: group, name: state.options[:name]}

    %{state | state: :ready, serving: serving, loader: nil, progress: nil, ready_at: now()}
    |> answer(Map.keys(state.waiting), {:ok, serving, self()})
  end

  # Nothing ends by it: a supervisor would try again at once, and soon give up.
  defp failed(state, error) do
    pause = min(@first_pause * 2 ** min(state.failures, 10), @longest_pause)

    Logger.error(
      "#{name(state)} could not load its model: #{Exception.message(error)}. " <>
        "It tries again in #{div(pause, 1000)} s"
    )

    Process.send_after(self(), :load, pause)

    %{state | state: {:failed, error}, loader: nil, progress: nil, failures: state.failures + 1}
    |> answer(Map.keys(state.waiting), {:error, error})
  end

  # The next pause is the first again after a time without a fault.
  defp broken(%{serving: serving} = state, error) do
    Native.close_group(serving.group)
    state = %{state | serving: nil}
    steady? = now() - state.ready_at > @longest_pause
    failures = if steady?, do: 0, else: state.failures

    cond do
      not Loader.loads_model?(state.options) ->
        Logger.error("#{name(state)} cannot go on: #{Exception.message(error)}")
        answer(%{state | state: {:failed, error}}, Map.keys(state.waiting), {:error, error})

      failures == 0 ->
        Logger.warning("#{name(state)} loads its model again: #{Exception.message(error)}")
        give_back(serving.model)
        load(%{state | failures: 1})

      true ->
        give_back(serving.model)
        failed(%{state | failures: failures}, error)
    end
  end

  # Whoever has a model that was given may unload it. One that is loaded here is loaded anew when a
  # request has met that.
  defp looked_at(%{state: :ready, serving: %{model: model}} = state) do
    loaded = Error.from_native(Native.check_loaded(model.ref, nil, nil))

    case {Loader.loads_model?(state.options), loaded} do
      {false, {:error, error}} -> broken(%{state | probe: nil}, error)
      _other -> state
    end
  end

  defp looked_at(state), do: state

  # The old model's memory, before there is a new one. Nobody waits for the answer.
  defp give_back(model), do: Native.unload_model(model.ref, false, make_ref())

  defp wait(state, {caller, _tag} = from, timeout) do
    monitor = Process.monitor(caller)
    timeout = timeout || state.options[:timeout] || @patience
    if timeout != :infinity, do: Process.send_after(self(), {:give_up, monitor}, timeout)
    %{state | waiting: Map.put(state.waiting, monitor, from)}
  end

  defp answer(state, monitors, answer) do
    {told, waiting} = Map.split(state.waiting, monitors)

    for {monitor, from} <- told do
      Process.demonitor(monitor, [:flush])
      GenServer.reply(from, answer)
    end

    %{state | waiting: waiting}
  end

  defp status(%{serving: nil} = state) do
    %{state: state.state, progress: state.progress, batch: 0, queue: map_size(state.waiting)}
  end

  defp status(%{serving: serving} = state) do
    {batch, queue} = Native.requests(serving.model.ref)
    given? = not Loader.loads_model?(state.options)
    told = if given?, do: state_of(serving, state.state), else: state.state
    %{state: told, progress: nil, batch: batch, queue: queue}
  end

  # Requests with token ids, or with an adapter of their own, go on where these were unloaded.
  defp state_of(%{model: model, tokenizer: tokenizer, options: options}, state) do
    refs = for handle <- [tokenizer, options.adapter], do: handle && handle.ref

    case Error.from_native(apply(Native, :check_loaded, [model.ref | refs])) do
      {:ok, :ok} -> state
      {:error, error} -> {:failed, error}
    end
  end

  # Nobody new comes in, and those who are there may end. What has not ended by then is cancelled
  # by the end of this process.
  defp drain(group, drain) do
    Native.close_group(group)
    drain_until(group, if(drain == :infinity, do: :infinity, else: now() + drain))
  end

  # An atom is above all numbers.
  defp drain_until(group, until) do
    if Native.group_size(group) > 0 and now() < until do
      refuse()
      drain_until(group, until)
    end
  end

  defp refuse do
    receive do
      {:"$gen_call", from, _call} -> GenServer.reply(from, stopping())
    after
      @nap -> :ok
    end
  end

  defp stopping, do: Error.error(:stopped, "the serving is stopping")
  defp name(state), do: "the serving #{inspect(state.options[:name])}"
  defp now, do: System.monotonic_time(:millisecond)
end
