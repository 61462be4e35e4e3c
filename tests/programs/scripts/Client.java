// java.net.http.HttpClient at its defaults: it prefers HTTP/2, and asks to upgrade.

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.List;
import java.util.stream.Collectors;

public class Client {
    static final String URL = System.getenv("BANDED_URL");
    static final HttpClient client = HttpClient.newHttpClient();

    interface Check {
        void run() throws Exception;
    }

    static void check(String name, Check check) {
        String error = null;
        try {
            check.run();
        } catch (Exception | AssertionError problem) {
            error = problem.toString().replaceAll("[^\\x20-\\x7e]", " ").replace("\\", "\\\\").replace("\"", "\\\"");
        }
        System.out.println("{\"check\": \"" + name + "\", \"error\": " + (error == null ? "null" : "\"" + error + "\"") + "}");
    }

    static HttpRequest post(String fields) {
        String body = "{\"model\": \"" + System.getenv("BANDED_MODEL") + "\", " + fields + "}";
        return HttpRequest.newBuilder(URI.create(URL + "/v1/completions"))
                .header("content-type", "application/json").POST(BodyPublishers.ofString(body)).build();
    }

    static void expect(boolean condition, Object found) {
        if (!condition) throw new AssertionError(found);
    }

    static void completes(HttpClient client) throws Exception {
        HttpResponse<String> answer = client.send(post("\"prompt\": \"Once\", \"max_tokens\": 8"), BodyHandlers.ofString());
        expect(answer.statusCode() == 200, answer.statusCode() + " " + answer.body());
        expect(answer.body().contains("text_completion"), answer.body());
    }

    public static void main(String[] arguments) throws Exception {
        System.out.println("{\"version\": \"" + System.getProperty("java.version") + "\"}");
        check("a completion, with its offer to upgrade to HTTP/2", () -> completes(client));
        check("a completion over HTTP/1.1",
                () -> completes(HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build()));
        check("a stream", () -> {
            HttpRequest request = post("\"prompt\": \"Once\", \"max_tokens\": 20, \"ignore_eos\": true, \"stream\": true");
            HttpResponse<java.util.stream.Stream<String>> answer = client.send(request, BodyHandlers.ofLines());
            List<String> lines = answer.body().filter(line -> line.startsWith("data: ")).collect(Collectors.toList());
            expect(answer.statusCode() == 200, answer.statusCode() + " " + lines);
            expect(lines.size() > 10, lines);
            expect(lines.get(lines.size() - 1).equals("data: [DONE]"), lines);
        });
        check("an error", () -> {
            HttpResponse<String> answer = client.send(post("\"max_tokens\": -1"), BodyHandlers.ofString());
            expect(answer.statusCode() == 400, answer.statusCode() + " " + answer.body());
            expect(answer.body().contains("\"param\":\"max_tokens\""), answer.body());
        });
        check("a kept connection that was idle for 5 s, twenty times", () -> {
            List<Thread> threads = new java.util.ArrayList<>();
            List<String> lost = java.util.Collections.synchronizedList(new java.util.ArrayList<>());
            for (int place = 0; place < 20; place++) {
                int idle = 4800 + 20 * place;
                Thread thread = new Thread(() -> {
                    HttpClient kept = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
                    try {
                        completes(kept);
                        Thread.sleep(idle);
                        completes(kept);
                    } catch (Exception | AssertionError problem) {
                        lost.add(idle + " ms: " + problem);
                    }
                });
                thread.start();
                threads.add(thread);
            }
            for (Thread thread : threads) thread.join();
            expect(lost.isEmpty(), lost.size() + " of 20 were lost, the first after " + lost.stream().findFirst().orElse(""));
        });
    }
}
