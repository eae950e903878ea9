defmodule Bombus.Application do
  @moduledoc false

  use Application

  @impl true
  def start(_type, _arguments) do
    Supervisor.start_link(Bombus.Telemetry.children(), strategy: :one_for_one)
  end
end
